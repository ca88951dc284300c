import math

import open_clip
import pytest
import torch
from torch import nn

from clip_exp.config.base import parse, plain
from clip_exp.config.model import ModelConfig
from clip_exp.errors import ConfigError
from clip_exp.models.clip import CLIP, build_model
from clip_exp.models.families.clip import CLIPTextConfig, ResNetConfig, ViTConfig
from clip_exp.weights.names import to_open_clip
from tests.exhaustive import repeat_beyond
from tests.models.twins import FOLDER, inputs, load_config, names, names_with_twin, shallow_timm, twin_of

# Their configurations in open_clip, each of which has a file here.
ARCHITECTURES = {
    "RN50", "RN101", "RN50x4", "RN50x16", "RN50x64", "ViT-S-32", "ViT-S-16", "ViT-M-32", "ViT-M-16", "ViT-B-32",
    "ViT-B-32-256", "ViT-B-16", "ViT-B-16-plus-240", "ViT-L-16", "ViT-L-14", "ViT-L-14-336", "ViT-H-14", "ViT-H-14-378",
    "ViT-g-14", "ViT-bigG-14", "ViT-B-16-SigLIP", "ViT-L-16-SigLIP-256", "ViT-SO400M-14-SigLIP",
}  # fmt: skip

WITHOUT_TWIN = ("vit_nano", "vit_tiny", "chinese_clip_rn50")


def test_every_architecture_of_open_clip_has_a_file() -> None:
    assert {load_config(name).open_clip_name for name in names_with_twin()} == ARCHITECTURES


@pytest.mark.parametrize("name", names_with_twin())
def test_model_has_the_weights_of_its_open_clip_twin_and_the_size_that_its_file_tells(name: str) -> None:
    config = load_config(name)
    assert config.name == name
    with torch.device("meta"):
        twin = twin_of(name, whole=True)
        model = build_model(config, init_logit_bias=None if twin.logit_bias is None else 0.0)
    ours = {key: list(tensor.shape) for key, tensor in to_open_clip(model.state_dict()).items()}
    assert ours == {key: list(tensor.shape) for key, tensor in twin.state_dict().items()}
    header = (FOLDER / f"{name}.yaml").read_text().splitlines()[0]
    assert header.endswith(f": {sum(p.numel() for p in model.parameters()):,} parameters.")


@pytest.mark.parametrize("name", repeat_beyond(WITHOUT_TWIN, sorted(set(names()) - set(names_with_twin()))))
def test_model_without_a_twin_ends_in_the_shared_space(name: str) -> None:
    config = load_config(name)
    assert config.name == name
    model = build_model(config)
    image_BCHW, tokens_BL = inputs(config)
    assert model.encode_image(image_BCHW).shape == model.encode_text(tokens_BL).shape == (2, config.embed_dim)


def medium_config() -> ModelConfig:
    """Wide enough for statistics, with towers that differ in every number."""
    return ModelConfig(
        name="medium",
        embed_dim=128,
        image=ViTConfig(image_size=96, patch_size=16, width=192, layers=3, heads=3),
        text=CLIPTextConfig(vocab_size=2000, width=256, layers=2, heads=4, mlp_ratio=2.0),
    )


def medium_twin() -> nn.Module:
    return open_clip.CLIP(
        128,
        {"image_size": 96, "patch_size": 16, "width": 192, "layers": 3},
        {"vocab_size": 2000, "width": 256, "layers": 2, "heads": 4, "mlp_ratio": 2.0},
    )


def medium_resnet() -> tuple[CLIP, nn.Module]:
    config = medium_config()
    config.image = ResNetConfig(image_size=64, stages=[2, 1, 1, 1], width=16, heads=8)
    text = {"vocab_size": 2000, "width": 256, "layers": 2, "heads": 4, "mlp_ratio": 2.0}
    return build_model(config), open_clip.CLIP(128, {"image_size": 64, "layers": [2, 1, 1, 1], "width": 16}, text)


def medium_siglip() -> tuple[CLIP, nn.Module]:
    config = load_config("siglip_b16")
    config.embed_dim = 192
    config.image.image_size, config.image.width, config.image.layers, config.image.heads = 96, 192, 3, 3
    config.text.width, config.text.layers, config.text.heads = 192, 2, 3
    settings = open_clip.get_model_config("ViT-B-16-SigLIP")
    settings["text_cfg"] |= {"width": 192, "layers": 2, "heads": 3}
    with shallow_timm(depth=3, embed_dim=192, num_heads=3, img_size=96):
        twin = open_clip.model.CustomTextCLIP(192, settings["vision_cfg"], settings["text_cfg"], init_logit_bias=-10.0)
    return build_model(config, init_logit_bias=-10.0), twin


FAMILIES = {
    "vit": lambda: (build_model(medium_config()), medium_twin()),
    "resnet": medium_resnet,
    "siglip": medium_siglip,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_initial_weights_have_the_distributions_of_open_clip(family: str) -> None:
    torch.manual_seed(0)
    model, twin = FAMILIES[family]()
    ours, theirs = to_open_clip(model.state_dict()), twin.state_dict()
    for name, tensor in theirs.items():
        if tensor.unique().numel() == 1:
            assert torch.equal(ours[name], tensor), name
            continue
        count = tensor.numel()
        # The standard error of a sample's standard deviation is std / sqrt(2 n), and this is a difference of two.
        tolerance = 5 / math.sqrt(count)
        assert ours[name].std().item() == pytest.approx(tensor.std().item(), rel=tolerance), name
        assert abs(ours[name].mean() - tensor.mean()) < tolerance * 1.5 * tensor.std(), name
        # Uniform and normal differ in how far they reach: 1.7 and more than 3 standard deviations.
        if count > 1000:
            reaches = [(x.abs().max() / x.std()).item() < 2 for x in (ours[name], tensor)]
            assert reaches[0] == reaches[1], name


def test_initial_weights_follow_the_seed() -> None:
    def build(seed: int) -> CLIP:
        torch.manual_seed(seed)
        return build_model(medium_config())

    first, again, other = build(3).state_dict(), build(3).state_dict(), build(4).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["image.class_embedding"], other["image.class_embedding"])


def test_initial_scale_and_bias_are_the_given_ones() -> None:
    model = build_model(medium_config(), init_logit_scale=math.log(10), init_logit_bias=-10.0)
    assert model.logit_scale.shape == model.logit_bias.shape == torch.Size([1])
    assert model.logit_scale.exp().item() == pytest.approx(10)
    assert model.logit_bias.item() == -10
    assert build_model(medium_config()).logit_scale.exp().item() == pytest.approx(1 / 0.07)


def test_numbers_that_do_not_fit_are_reported_together() -> None:
    config = medium_config()
    config.image.patch_size, config.text.heads = 20, 5
    with pytest.raises(ConfigError, match=r"(?s)image_size=96.*patch_size=20.*text\.width=256.*heads=5"):
        build_model(config)


def test_towers_that_cannot_meet_or_lack_patches_are_refused() -> None:
    siglip = load_config("siglip_b16")
    siglip.embed_dim = 512
    with pytest.raises(ConfigError, match=r"embed_dim=512 must be model\.image\.width=768"):
        build_model(siglip)
    with pytest.raises(ConfigError, match=r"model\.image\.patch_dropout is a key of .*, which is not selected"):
        parse(
            ModelConfig,
            {**plain(load_config("rn50")), "image": {**plain(load_config("rn50").image), "patch_dropout": 0.5}},
            "model.",
        )
