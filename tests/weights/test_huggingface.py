"""Tests that models of transformers and ours have the same features with the same weights, in both directions."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from clip_exp.config.model import Activation, ModelConfig
from clip_exp.config.names import named_model
from clip_exp.errors import CheckpointError, ConfigError
from clip_exp.models.clip import CLIP, build_model
from clip_exp.models.families.published import huggingface_config, model_config_of
from clip_exp.weights.fit import load_weights
from clip_exp.weights.inspect import describe
from clip_exp.weights.names import to_huggingface, to_ours
from tests.exhaustive import repeat_beyond

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

VOCABULARY, CONTEXT = 500, 20
VISION = {
    "hidden_size": 48, "intermediate_size": 100, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8
}  # fmt: skip
TEXT = {
    "hidden_size": 48, "intermediate_size": 120, "num_hidden_layers": 2, "num_attention_heads": 3, "vocab_size": VOCABULARY,
    "max_position_embeddings": CONTEXT, "bos_token_id": VOCABULARY - 2, "eos_token_id": VOCABULARY - 1,
}  # fmt: skip
FAMILIES = pytest.mark.parametrize("family", ["clip", "siglip"])


def built(config: dict[str, Any]) -> nn.Module:
    """Return transformers' model for a `config.json`, with random weights."""
    torch.manual_seed(0)
    config_class, model_class = (
        (CLIPConfig, CLIPModel) if config["model_type"] == "clip" else (SiglipConfig, SiglipModel)
    )
    model = model_class(config_class.from_dict(config)).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def small(family: str, text: dict[str, Any] | None = None, **values: Any) -> dict[str, Any]:
    config = {"model_type": family, "vision_config": VISION, "text_config": TEXT | (text or {}), **values}
    return {"projection_dim": 40, **config} if family == "clip" else config


def ours(theirs: nn.Module, config: dict[str, Any]) -> tuple[CLIP, ModelConfig]:
    model_config = model_config_of(config)
    if model_config.text.kind == "siglip":
        model_config.text.tokenizer = "none"
    bias = 0.0 if config["model_type"] == "siglip" else None
    model = build_model(model_config, init_logit_bias=bias).eval()
    model.load_state_dict(to_ours("transformers", theirs.state_dict()))
    return model, model_config


@torch.no_grad()
def assert_same_features(theirs: nn.Module, ours: CLIP, config: dict[str, Any], end: int) -> None:
    size = config["vision_config"]["image_size"]
    length = config["text_config"]["max_position_embeddings"]
    image_BCHW = torch.randn(3, 3, size, size)
    tokens_BL = torch.randint(1, end - 1, (3, length))
    for i, row_L in enumerate(tokens_BL):
        row_L[5 + i :] = 0
        row_L[5 + i] = end
    their_image, their_text = theirs.get_image_features(image_BCHW), theirs.get_text_features(tokens_BL)
    torch.testing.assert_close(ours.encode_image(image_BCHW), their_image.pooler_output, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.encode_text(tokens_BL), their_text.pooler_output, rtol=0, atol=1e-5)
    assert torch.equal(ours.logit_scale, theirs.logit_scale.reshape(1))


@FAMILIES
def test_features_are_those_of_transformers(family: str) -> None:
    config = small(family)
    theirs = built(config)
    assert_same_features(theirs, ours(theirs, config)[0], config, VOCABULARY - 1)


@FAMILIES
def test_weights_go_back_unchanged_into_the_model_that_our_configuration_describes(family: str) -> None:
    theirs = built(small(family))
    model, config = ours(theirs, small(family))
    again = built(huggingface_config(config))
    again.load_state_dict(to_huggingface(model.state_dict(), config), strict=True)
    assert again.state_dict().keys() == theirs.state_dict().keys()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert_same_features(again, model, small(family), VOCABULARY - 1)


@pytest.mark.parametrize("name", repeat_beyond(("vit_b32",), ["vit_b32", "vit_b16", "siglip_b16"]))
def test_full_size_models_have_the_features_of_transformers_and_their_weights_go_back(name: str) -> None:
    config = huggingface_config(named_model(name))
    theirs = built(config)
    model, again = ours(theirs, config)
    assert (again.image.width, again.text.layers, again.embed_dim) == (768, 12, named_model(name).embed_dim)
    assert_same_features(theirs, model, config, again.text.vocab_size - 1)
    back = to_huggingface(model.state_dict(), again)
    assert back.keys() == theirs.state_dict().keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in theirs.state_dict().items())


@pytest.mark.parametrize(
    "name", ["vit_b32", "vit_l14_336", "vit_g14", "vit_bigg14", "vit_h14", "siglip_b16", "siglip_so400m"]
)
def test_a_configuration_goes_there_and_back(name: str) -> None:
    model = named_model(name)
    again = model_config_of(json.loads(json.dumps(huggingface_config(model))))
    for tower, numbers in (("image", ("image_size", "patch_size")), ("text", ("context_length", "vocab_size"))):
        before, after = getattr(model, tower), getattr(again, tower)
        for number in ("kind", "width", "layers", "heads", *numbers):
            assert getattr(after, number) == getattr(before, number)
        assert int(after.width * after.mlp_ratio) == int(before.width * before.mlp_ratio)
    assert again.embed_dim == model.embed_dim
    assert again.activation is (model.activation or Activation.gelu)


@pytest.mark.parametrize(
    ("hidden_act", "activation"),
    [
        ("quick_gelu", Activation.quick_gelu),
        ("gelu", Activation.gelu),
        ("gelu_pytorch_tanh", Activation.gelu_tanh),
        ("gelu_new", Activation.gelu_tanh),
    ],
)
def test_the_activation_is_that_of_the_configuration(hidden_act: str, activation: Activation) -> None:
    config = small("clip", text={"hidden_act": hidden_act})
    config["vision_config"] = VISION | {"hidden_act": hidden_act}
    theirs = built(config)
    model, ours_config = ours(theirs, config)
    assert ours_config.activation is activation
    assert_same_features(theirs, model, config, VOCABULARY - 1)


def test_the_end_token_of_old_configurations_means_the_highest_id() -> None:
    config = small("clip", text={"eos_token_id": 2})
    theirs = built(config)
    assert_same_features(theirs, ours(theirs, config)[0], config, VOCABULARY - 1)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "bert"}, "model_type=bert is not supported. Supported: clip, siglip"),
        (
            small("clip", text={"hidden_act": "gelu"}),
            "hidden_act=quick_gelu of the image tower and gelu of the text tower must be equal",
        ),
        (small("clip", text={"hidden_act": "relu"}), "hidden_act=quick_gelu of the image tower and relu"),
        (small("clip", text={"layer_norm_eps": 1e-6}), "layer_norm_eps=1e-05 and 1e-06 must be 1e-05"),
        (small("clip", text={"eos_token_id": 7}), "eos_token_id=7 must be the highest of 500 ids"),
        (small("siglip", text={"projection_size": 30}), "projection_size=30 of the text tower must be 48"),
        (small("siglip") | {"vision_config": VISION | {"vision_use_head": False}}, "needs its pooling head"),
        (small("clip") | {"vision_config": VISION | {"num_channels": 1}}, "three channels"),
    ],
)
def test_what_our_towers_do_not_compute_is_refused(config: dict[str, Any], reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        model_config_of(config)


def test_towers_that_transformers_does_not_have_are_refused() -> None:
    with pytest.raises(ConfigError, match="transformers has no model with a resnet and a clip tower"):
        huggingface_config(named_model("rn50"))


@FAMILIES
@pytest.mark.parametrize("parts", [False, True])
def test_a_saved_folder_loads_by_itself(family: str, parts: bool, tmp_path: Path) -> None:
    config = small(family)
    theirs = built(config)
    theirs.save_pretrained(tmp_path, max_shard_size="50KB" if parts else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == parts
    about = describe(tmp_path)
    assert about.format == "Hugging Face folder"
    assert about.model is not None
    assert about.activation is (Activation.quick_gelu if family == "clip" else Activation.gelu_tanh)
    model = build_model(about.model, init_logit_bias=0.0 if family == "siglip" else None).eval()
    assert load_weights(model, tmp_path) == []
    assert_same_features(theirs, model, config, VOCABULARY - 1)


def test_a_folder_of_an_older_version_loads(tmp_path: Path) -> None:
    """`pytorch_model.bin` contains position ids, and the configuration has no defaults."""
    config = small("clip")
    theirs = built(config)
    positions = {
        "text_model.embeddings.position_ids": torch.arange(CONTEXT)[None],
        "vision_model.embeddings.position_ids": torch.arange(17)[None],
    }
    torch.save(theirs.state_dict() | positions, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(config))
    about = describe(tmp_path)
    assert about.model is not None
    model = build_model(about.model).eval()
    assert load_weights(model, tmp_path) == []
    assert_same_features(theirs, model, config, VOCABULARY - 1)


def test_half_of_an_attention_is_not_fused_but_named() -> None:
    theirs = built(small("clip"))
    state = theirs.state_dict()
    del state["text_model.encoder.layers.1.self_attn.v_proj.weight"]
    ours_state = to_ours("transformers", state)
    assert sum(".1.self_attn." in name for name in ours_state) == 2  # of queries and keys
    assert "text.transformer.blocks.1.attention.qkv.weight" not in ours_state
