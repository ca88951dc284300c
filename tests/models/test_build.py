import math
from pathlib import Path

import open_clip
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from clip_exp.config.model_schema import ImageTowerConfig, ModelConfig, TextTowerConfig
from clip_exp.errors import ConfigError
from clip_exp.models import CLIP, build_model
from clip_exp.weights import to_open_clip

FILES = sorted((Path(__file__).parents[2] / "conf" / "model").glob("vit_*.yaml"))
OPEN_CLIP_NAMES = {
    "vit_s32": "ViT-S-32",
    "vit_s16": "ViT-S-16",
    "vit_b32": "ViT-B-32",
    "vit_b16": "ViT-B-16",
    "vit_l14": "ViT-L-14",
    "vit_l14_336": "ViT-L-14-336",
    "vit_h14": "ViT-H-14",
    "vit_g14": "ViT-g-14",
    "vit_bigg14": "ViT-bigG-14",
}


def load_config(file: Path) -> ModelConfig:
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), OmegaConf.load(file)))
    assert isinstance(config, ModelConfig)
    return config


def test_every_open_clip_twin_has_a_file() -> None:
    assert OPEN_CLIP_NAMES.keys() <= {file.stem for file in FILES}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_model_has_the_parameters_of_its_open_clip_twin(file: Path) -> None:
    config = load_config(file)
    assert config.name == file.stem
    with torch.device("meta"):
        model = build_model(config)
        if file.stem not in OPEN_CLIP_NAMES:
            assert model.image.projection.weight.shape[0] == model.text.projection.weight.shape[0] == config.embed_dim
            return
        twin = open_clip.CLIP(**open_clip.get_model_config(OPEN_CLIP_NAMES[file.stem]))
    ours = {name: list(tensor.shape) for name, tensor in to_open_clip(model.state_dict()).items()}
    assert ours == {name: list(tensor.shape) for name, tensor in twin.state_dict().items()}


def test_vit_b32_has_151_277_313_parameters() -> None:
    with torch.device("meta"):
        model = build_model(load_config(next(file for file in FILES if file.stem == "vit_b32")))
    assert sum(p.numel() for p in model.parameters()) == 151_277_313


def medium_config() -> ModelConfig:
    """Wide enough for statistics, with towers that differ in every number."""
    return ModelConfig(
        name="medium",
        embed_dim=128,
        image=ImageTowerConfig(image_size=96, patch_size=16, width=192, layers=3, heads=3),
        text=TextTowerConfig(vocab_size=2000, width=256, layers=2, heads=4, mlp_ratio=2.0),
    )


def medium_twin() -> nn.Module:
    return open_clip.CLIP(
        128,
        {"image_size": 96, "patch_size": 16, "width": 192, "layers": 3},
        {"vocab_size": 2000, "width": 256, "layers": 2, "heads": 4, "mlp_ratio": 2.0},
    )


def test_initial_weights_have_the_distributions_of_open_clip() -> None:
    torch.manual_seed(0)
    ours = to_open_clip(build_model(medium_config()).state_dict())
    theirs = medium_twin().state_dict()
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


def test_numbers_that_do_not_fit_are_told_at_once() -> None:
    config = medium_config()
    config.image.patch_size, config.text.heads = 20, 5
    with pytest.raises(ConfigError, match=r"(?s)image_size=96.*patch_size=20.*text\.width=256.*heads=5"):
        build_model(config)
