import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import nn

from clip_exp import open_clip_files
from clip_exp.config.model import Activation, ModelConfig
from clip_exp.errors import ConfigError
from clip_exp.export.write import write_export
from clip_exp.models.clip import build_model
from clip_exp.text.tokenizer import build_tokenizer
from clip_exp.weights.fit import load_weights
from clip_exp.weights.inspect import About, Found, note_architecture, resolve_model
from clip_exp.weights.names import to_ours
from tests.compose import train_config
from tests.encoders import CAPTIONS, write_encoder, write_siglip_tokenizer

VISION = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "head_width": 16}
TEXT = {"context_length": 20, "vocab_size": 49408, "width": 48, "heads": 3, "layers": 2}
TIMM = {"timm_model_pretrained": False, "timm_pool": "", "timm_proj": "linear", "image_size": 160}
SIGLIP = {"context_length": 20, "vocab_size": 300, "no_causal_mask": True, "proj_bias": True, "pool_type": "last"}


def descriptions(folder: Path) -> dict[str, dict[str, Any]]:
    """Small ones of every sort that open_clip has."""
    encoder = str(write_encoder(folder / "roberta", "roberta"))
    tokenizer = str(write_siglip_tokenizer(folder / "siglip"))
    coca = {"width": 48, "heads": 3, "layers": 1, "context_length": 20, "vocab_size": 49408}
    found = {
        "small-vit": {},
        "small-vit-quickgelu": {"quick_gelu": True},
        "small-rn": {"vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None}},
        "small-convnext": {"vision_cfg": {**TIMM, "timm_model_name": "test_convnext", "timm_proj": "mlp"}},
        "small-timm-vit": {"vision_cfg": {**TIMM, "timm_model_name": "test_vit"}, "custom_text": True},
        "small-coca": {
            "vision_cfg": {**VISION, "attentional_pool": True, "attn_pooler_heads": 4, "output_tokens": True},
            "text_cfg": {**TEXT, "embed_cls": True, "output_tokens": True},
            "multimodal_cfg": coca,
            "custom_text": True,
        },
        "small-both-ways": {"text_cfg": {**TEXT, "no_causal_mask": True}, "custom_text": True},
        "small-siglip": {
            "text_cfg": {
                **TEXT, **SIGLIP, "hf_tokenizer_name": tokenizer, "tokenizer_kwargs": {"clean": "canonicalize"},
                "act_kwargs": {"approximate": "tanh"},
            },
            "custom_text": True,
            "init_logit_bias": -10,
        },
        "small-eos": {"text_cfg": {**TEXT, "vocab_size": 300, "pool_type": "eos", "eos_id": 1, "hf_tokenizer_name": tokenizer}},
        "small-roberta": {"text_cfg": {"hf_model_name": encoder, "hf_tokenizer_name": encoder, "hf_pooler_type": "mean_pooler"}},
    }  # fmt: skip
    base = {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT}
    return {name: {**base, **values} for name, values in found.items()}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, dict[str, Any]]]:
    """Their descriptions, known to open_clip and to us."""
    folder = tmp_path_factory.mktemp("open_clip")
    values = descriptions(tmp_path_factory.mktemp("towers"))
    for name, description in values.items():
        (folder / f"{name}.json").write_text(json.dumps(description))
    open_clip.add_model_config(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(open_clip_files, "configurations", lambda: sorted(values))
        patch.setattr(open_clip_files, "configuration", values.__getitem__)
        yield values
    open_clip.factory._MODEL_CONFIG_PATHS.remove(folder)
    for name in values:
        del open_clip.factory._MODEL_CONFIGS[name]


SHORT = ["a cat", "two dogs", "the digit 3"]
SMALL = [
    "small-vit", "small-vit-quickgelu", "small-rn", "small-convnext", "small-timm-vit", "small-coca", "small-both-ways",
    "small-siglip", "small-eos", "small-roberta",
]  # fmt: skip


def configured(name: str, *overrides: str) -> ModelConfig:
    config = train_config("model=open_clip", f"model.name={name}", "model.text.context_length=20", *overrides)
    return note_architecture(config.model)


def images(size: int) -> torch.Tensor:
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))


def twin_of(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return open_clip.create_model(name, force_context_length=20, **options).eval()


@pytest.mark.parametrize("name", SMALL)
def test_features_equal_open_clip(small, name: str) -> None:
    config, twin = configured(name), twin_of(name)
    bias = None if twin.logit_bias is None else 0.0
    model = build_model(config, init_logit_bias=bias).eval()
    model.load_state_dict(to_ours("open_clip", twin.state_dict(), config))
    image_BCHW = images(config.image.image_size)
    tokens_BL = build_tokenizer(config.text)(SHORT)
    padded_BL = open_clip.get_tokenizer(name, context_length=20)(SHORT)
    torch.testing.assert_close(
        model.encode_image(image_BCHW), twin.encode_image(image_BCHW, normalize=False), rtol=0, atol=1e-5
    )
    torch.testing.assert_close(
        model.encode_text(tokens_BL), twin.encode_text(padded_BL, normalize=False), rtol=0, atol=1e-5
    )
    assert (tokens_BL.shape[1] < padded_BL.shape[1]) == config.text.trim
    torch.testing.assert_close(model.logit_scale.squeeze(), twin.logit_scale)


@pytest.mark.parametrize("name", SMALL)
def test_text_is_trimmed_where_that_changes_nothing_and_only_there(small, name: str) -> None:
    config = configured(name)
    model = build_model(config).eval()
    lists = build_tokenizer(config.text).encode_batch(SHORT)
    whole_BL = build_tokenizer(config.text).pad(lists, 20)
    trimmed_BL = whole_BL[:, : max(map(len, lists))]
    same = torch.allclose(model.text(trimmed_BL), model.text(whole_BL), rtol=0, atol=1e-5)
    assert same == config.text.trim


@pytest.mark.parametrize("name", ["small-vit", "small-rn", "small-timm-vit", "small-coca", "small-roberta"])
def test_every_weight_gets_a_gradient(small, name: str) -> None:
    """Distributed training waits for every one of them."""
    config = configured(name)
    model = build_model(config)
    output = model(images(config.image.image_size), build_tokenizer(config.text)(CAPTIONS[:3]), 2)
    (output.logit_scale * output.image_features @ output.text_features.T).square().sum().backward()
    assert [parameter for parameter, p in model.named_parameters() if p.grad is None] == []


def test_the_image_size_can_be_another(small) -> None:
    for name, size in (("small-vit", 64), ("small-rn", 96), ("small-timm-vit", 64), ("small-convnext", 64)):
        config = configured(name, f"model.image.image_size={size}")
        twin = twin_of(name, force_image_size=size)
        model = build_model(config).eval()
        model.load_state_dict(to_ours("open_clip", twin.state_dict(), config))
        torch.testing.assert_close(model.encode_image(images(size)), twin.encode_image(images(size)), rtol=0, atol=1e-5)


def test_the_activation_is_the_configurations_unless_it_is_set(small) -> None:
    def kinds(config: ModelConfig) -> set[str]:
        return {type(module).__name__ for module in build_model(config).modules()} & {"GELU", "QuickGELU"}

    assert kinds(configured("small-vit")) == {"GELU"}
    assert kinds(configured("small-vit-quickgelu")) == {"QuickGELU"}
    assert kinds(configured("small-vit", "model.activation=quick_gelu")) == {"QuickGELU"}
    assert kinds(configured("small-siglip", "model.activation=quick_gelu")) == {"QuickGELU"}, "in the place of its tanh"
    tanh = build_model(configured("small-vit", f"model.activation={Activation.gelu_tanh}"))
    assert {module.approximate for module in tanh.modules() if isinstance(module, nn.GELU)} == {"tanh"}


def test_weights_that_tell_their_activation_decide_it(small, tmp_path: Path) -> None:
    def resolved(activation: Activation | None) -> Activation | None:
        found = Found(tmp_path, About("file", activation), "weights")
        return resolve_model(configured("small-vit-quickgelu"), found).activation

    assert resolved(Activation.gelu) is Activation.gelu
    assert resolved(None) is None, "the configuration's own"
    with pytest.raises(ConfigError, match="was trained with quick_gelu"):
        resolve_model(
            configured("small-vit", "model.activation=gelu"),
            Found(tmp_path, About("file", Activation.quick_gelu), "weights"),
        )


def test_patch_dropout_acts_in_training_only(small) -> None:
    model = build_model(configured("small-vit", "model.image.patch_dropout=0.5"))
    assert not torch.equal(model.encode_image(images(32)), model.encode_image(images(32)))
    model.eval()
    assert torch.equal(model.encode_image(images(32)), model.encode_image(images(32)))


def test_a_noted_encoder_is_built_where_its_folder_is_gone(small, tmp_path: Path) -> None:
    folder = write_encoder(tmp_path / "encoder", "roberta", seed=3)
    config = configured("small-roberta", f"model.text.name={folder}")
    own = build_model(config, own_weights={"text"}).eval().text
    tokens_BL = build_tokenizer(config.text)(CAPTIONS)
    twin = open_clip.hf_model.HFTextEncoder(str(folder), 24, pooler_type="mean_pooler", proj_type="mlp").eval()
    twin.proj.load_state_dict(own.proj.state_dict())
    torch.testing.assert_close(own(tokens_BL), twin(tokens_BL), rtol=0, atol=1e-5)
    folder.rename(tmp_path / "gone")
    model = build_model(config).eval()
    model.text.load_state_dict(own.state_dict())
    torch.testing.assert_close(model.text(tokens_BL), own(tokens_BL))


def test_a_tokenizer_is_compared_with_the_encoder_whatever_the_configuration_embeds(small) -> None:
    """Of open_clip's configurations with an encoder none tells a vocabulary: OpenAI's is its default."""
    config = configured("small-roberta", "model.text.vocab_size=100")
    assert build_tokenizer(config.text)(SHORT).max() >= 100
    config.text.architecture["vocab_size"] = 100
    with pytest.raises(ConfigError, match="but the text tower embeds only 100 ids"):
        build_tokenizer(config.text)


@pytest.mark.parametrize("name", ["small-vit", "small-rn", "small-timm-vit", "small-coca", "small-roberta"])
def test_files_of_open_clip_are_read(small, name: str, tmp_path: Path) -> None:
    config, twin = configured(name), twin_of(name)
    model = build_model(config).eval()
    torch.save({"state_dict": {f"module.{key}": value for key, value in twin.state_dict().items()}}, tmp_path / "a.pt")
    assert load_weights(model, tmp_path / "a.pt", config) == []
    tokens_BL = open_clip.get_tokenizer(name, context_length=20)(SHORT)
    expected = twin.encode_text(tokens_BL, normalize=False)
    torch.testing.assert_close(model.encode_text(tokens_BL), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [("small-coca", ()), ("small-vit", ("model.activation=gelu_tanh",)), ("small-siglip", ()), ("small-eos", ())],
)
def test_an_export_is_a_model_that_open_clip_builds_by_itself(
    small, name: str, overrides: tuple[str, ...], tmp_path: Path
) -> None:
    """CoCa's without its decoder, as two towers."""
    config = configured(name, *overrides)
    torch.manual_seed(0)
    model = build_model(config).eval().requires_grad_(False)
    folder = write_export(model, config, None, tmp_path / "exported").folder
    twin = open_clip.create_model(f"local-dir:{folder}").eval()
    images_BCHW, tokens_BL = images(config.image.image_size), build_tokenizer(config.text)(SHORT)
    whole_BL = build_tokenizer(config.text.model_copy(update={"trim": False}))(SHORT)
    torch.testing.assert_close(twin.encode_image(images_BCHW), model.encode_image(images_BCHW), rtol=0, atol=1e-5)
    torch.testing.assert_close(twin.encode_text(whole_BL), model.encode_text(tokens_BL), rtol=0, atol=1e-5)
    # In towers this small the approximation by tanh is closer than that.
    assert activations(twin) == activations(model)


def activations(model: nn.Module) -> set[str]:
    return {str(module) for module in model.modules() if isinstance(module, nn.GELU)}


REFUSED = {
    "unknown": ("small-vitt", [], "is not a model of open_clip: did you mean small-vit"),
    "dropout": ("small-vit", ["model.dropout=0.1"], "open_clip's towers have no dropout"),
    "patches of a ResNet": ("small-rn", ["model.image.patch_dropout=0.5"], "a ResNet has no patches"),
    "size between patches": ("small-timm-vit", ["model.image.image_size=65"], "cannot be built with model.image.image_size=65"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "overrides", "expected"), REFUSED.values(), ids=REFUSED.keys())
def test_what_a_configuration_cannot_be_is_refused(small, name: str, overrides: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_model(configured(name, *overrides))
    assert expected in str(caught.value)
