from pathlib import Path

import open_clip
import pytest
import torch
from torch import nn

from clip_exp.config.model import ModelConfig, Projection
from clip_exp.export import open_clip as open_clip_format
from clip_exp.models.clip import CLIP, build_model
from clip_exp.models.families.huggingface import HuggingFaceTextConfig
from clip_exp.models.families.timm import TimmConfig
from clip_exp.weights.names import to_open_clip, to_ours
from tests.encoders import write_encoder, write_siglip_tokenizer
from tests.exhaustive import repeat_beyond
from tests.models.small import open_clip_twin, small_config
from tests.models.twins import (
    CUT_LAYERS,
    REPRESENTATIVES,
    cut,
    inputs,
    load_config,
    names_with_twin,
    randomize,
    settings_of,
    shallow_timm,
    twin_of,
    with_weights_of,
)

WHOLE = ("rn50", "vit_b32", "vit_b16", "siglip_b16")


def assert_equal_both_ways(config: ModelConfig, twin: nn.Module, names_tell: bool = True) -> CLIP:
    """Return our model with the weights of `twin`."""
    twin.eval()
    model = with_weights_of(twin, config).eval()
    image_BCHW, tokens_BL = inputs(config)
    with torch.no_grad():
        for ours, theirs in [
            (model.encode_image(image_BCHW), twin.encode_image(image_BCHW)),
            (model.encode_text(tokens_BL), twin.encode_text(tokens_BL)),
        ]:
            assert theirs.std() > 1e-2  # or any two would be close
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    back, before = to_open_clip(model.state_dict(), config), twin.state_dict()
    assert back.keys() == before.keys()
    assert all(back[name].shape == value.shape and torch.equal(back[name], value) for name, value in before.items())
    if names_tell:  # which towers they are of, without a configuration
        assert all(torch.equal(value, back[name]) for name, value in to_open_clip(model.state_dict()).items())
    twin.load_state_dict(back, strict=True)
    return model


@pytest.mark.parametrize("name", repeat_beyond(REPRESENTATIVES, names_with_twin()))
def test_open_clip_weights_give_the_same_features_here_and_go_back_as_a_file_that_it_loads_by_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    config, twin = cut(load_config(name)), randomize(twin_of(name))
    model = assert_equal_both_ways(config, twin)
    if config.text.tokenizer is not None:  # the published one is on the hub
        config.text.tokenizer = str(write_siglip_tokenizer(tmp_path / "tokenizer"))
    open_clip_format.write(tmp_path, model, config)
    theirs = str(config.open_clip_name)
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", {theirs: settings_of(name)})
    with shallow_timm(depth=CUT_LAYERS):
        again = open_clip.create_model(theirs, pretrained=str(tmp_path / open_clip_format.WEIGHTS))
    assert str(again.visual) == str(twin.visual), "of the same parts: the same weights are the same features"
    assert again.state_dict().keys() == twin.state_dict().keys()
    assert all(torch.equal(again.state_dict()[key], tensor) for key, tensor in twin.state_dict().items())


@pytest.mark.parametrize("name", repeat_beyond(("rn50", "vit_b32"), WHOLE))
def test_open_clip_weights_of_a_whole_model_give_the_same_features_here_and_go_back_unchanged(name: str) -> None:
    torch.manual_seed(0)
    assert_equal_both_ways(load_config(name), randomize(twin_of(name, whole=True), std=0.01))


@pytest.mark.parametrize("name", [name for name in names_with_twin() if name.startswith("siglip")])
def test_siglip_images_and_texts_are_prepared_as_its_weights_need(name: str) -> None:
    config = load_config(name)
    published = open_clip.get_pretrained_cfg(config.open_clip_name, "webli")
    assert {key: getattr(config.image, key) for key in ("interpolation", "resize_mode")} == {
        key: published[key] for key in ("interpolation", "resize_mode")
    }
    assert (config.image.mean, config.image.std) == (list(published["mean"]), list(published["std"]))
    text = open_clip.get_model_config(config.open_clip_name)["text_cfg"]
    assert config.text.tokenizer == text["hf_tokenizer_name"]
    assert config.text.cleaning == text["tokenizer_kwargs"]["clean"]


def test_weights_go_to_open_clip_and_back_unchanged() -> None:
    model = build_model(small_config())
    twin = open_clip_twin(model)  # loads strictly
    back = to_ours("open_clip", twin.state_dict())
    model.load_state_dict(back, strict=True)
    theirs, again = twin.state_dict(), to_open_clip(back)
    assert again.keys() == theirs.keys()
    assert all(
        torch.equal(again[name], tensor) and again[name].shape == tensor.shape for name, tensor in theirs.items()
    )


def test_a_text_tower_under_text_is_read_like_one_at_the_top_level() -> None:
    state = build_model(small_config()).state_dict()
    flat = to_open_clip(state)
    nested = {
        name if name.startswith(("visual.", "logit_")) else f"text.{name}": tensor for name, tensor in flat.items()
    }
    open_clip.model.CustomTextCLIP(
        40,
        {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 16},
        {"context_length": 77, "vocab_size": 500, "width": 48, "layers": 2, "heads": 3},
    ).load_state_dict(nested, strict=True)
    ours = to_ours("open_clip", nested)
    assert ours.keys() == state.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("projection", [Projection.linear, Projection.mlp])
def test_towers_of_timm_and_hugging_face_give_the_same_features_here_and_go_back_unchanged(
    projection: Projection, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    folder, settings = str(write_encoder(tmp_path, "xlm-roberta")), {"hf_model_pretrained": False}
    config = ModelConfig(
        name="foreign",
        embed_dim=24,
        image=TimmConfig(name="resnet10t", image_size=64, projection=projection),
        text=HuggingFaceTextConfig(name=folder, context_length=30, projection=projection),
    )
    twin = open_clip.model.CustomTextCLIP(
        24,
        {"timm_model_name": "resnet10t", "timm_pool": "", "timm_proj": projection.value, "image_size": 64},
        {"hf_model_name": folder, "hf_proj_type": projection.value, "hf_pooler_type": "mean_pooler", **settings},
    )
    assert_equal_both_ways(config, randomize(twin), names_tell=False)
    old = {**twin.state_dict(), "text.transformer.embeddings.position_ids": torch.arange(40)}
    assert to_ours("open_clip", old).keys() == to_ours("open_clip", twin.state_dict()).keys()


def test_bias_of_the_sigmoid_loss_has_no_axis_there_and_one_here() -> None:
    model = build_model(small_config(), init_logit_bias=-10.0)
    theirs = to_open_clip(model.state_dict())
    assert theirs["logit_scale"].shape == theirs["logit_bias"].shape == torch.Size([])
    ours = to_ours("open_clip", theirs)
    assert ours["logit_scale"].shape == ours["logit_bias"].shape == torch.Size([1])


def test_entries_that_are_not_weights_are_left_out() -> None:
    state = build_model(small_config()).state_dict()
    theirs = to_open_clip(state)
    theirs |= {name: torch.tensor(77) for name in ("input_resolution", "context_length", "vocab_size")}
    ours = to_ours("open_clip", theirs)
    assert ours.keys() == state.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in state.items())
