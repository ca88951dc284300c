"""Tests of completing a model's configuration from its weights, and of refusing values that do not fit them."""

from pathlib import Path

import pytest

from clip_exp import open_clip_files
from clip_exp.config.model import Activation, Interpolation, ModelConfig, Pooler, ResizeMode
from clip_exp.config.names import named_model
from clip_exp.errors import ConfigError
from clip_exp.models.families.clip import CLIPTextConfig
from clip_exp.models.families.timm import TimmConfig
from clip_exp.weights.inspect import About, Found, activation_of_entry, as_resolved, note_architecture, resolve_model


def found(**about) -> Found:
    return Found(Path("w.pt"), About("file", **about), "w.pt")


MODEL = named_model("vit_nano")


@pytest.mark.parametrize("trained", list(Activation))
def test_the_activation_is_that_of_the_weights(trained: Activation, capsys) -> None:
    assert resolve_model(MODEL, found(activation=trained)).activation is trained
    assert f"model.activation={trained}: the activation of the weights w.pt" in capsys.readouterr().err
    assert (
        resolve_model(MODEL.model_copy(update={"activation": trained}), found(activation=trained)).activation is trained
    )
    assert capsys.readouterr().err == "", "nothing was decided"


def test_a_setting_that_does_not_fit_the_weights_is_refused_with_a_hint() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_model(MODEL.model_copy(update={"activation": Activation.gelu}), found(activation=Activation.quick_gelu))
    assert "model.activation=gelu, but w.pt was trained with quick_gelu: leave it out" in str(caught.value)


def test_weights_of_unknown_activation_default_to_gelu_with_a_message(capsys) -> None:
    assert resolve_model(MODEL, found()).activation is Activation.gelu
    output = capsys.readouterr().err
    assert "of w.pt is unknown" in output
    assert "set model.activation=quick_gelu" in output
    assert (
        resolve_model(MODEL.model_copy(update={"activation": Activation.quick_gelu}), found()).activation
        is Activation.quick_gelu
    )
    assert capsys.readouterr().err == ""


def test_a_configuration_without_an_activation_means_gelu(capsys) -> None:
    assert resolve_model(MODEL, found(model=MODEL)).activation is Activation.gelu
    assert "the activation of the weights" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="was trained with gelu"):
        resolve_model(MODEL.model_copy(update={"activation": Activation.quick_gelu}), found(model=MODEL))


def test_images_are_preprocessed_as_in_training_unless_configured() -> None:
    about = {
        "mean": [0.5] * 3,
        "std": [0.25] * 3,
        "interpolation": Interpolation.bilinear,
        "resize_mode": ResizeMode.squash,
    }
    weights = found(activation=Activation.gelu, **about)
    resolved = resolve_model(MODEL, weights).image
    assert {name: getattr(resolved, name) for name in about} == about
    own = MODEL.model_copy(
        update={"image": MODEL.image.model_copy(update={"mean": [0.1] * 3, "resize_mode": ResizeMode.shortest})}
    )
    resolved = resolve_model(own, weights).image
    assert (resolved.mean, resolved.resize_mode) == ([0.1] * 3, ResizeMode.shortest)
    assert (resolved.std, resolved.interpolation) == ([0.25] * 3, Interpolation.bilinear)


def test_the_number_of_heads_is_compared() -> None:
    theirs = MODEL.model_copy(update={"image": MODEL.image.model_copy(update={"heads": 1})})
    with pytest.raises(
        ConfigError, match=r"model=vit_nano: model\.image\.heads=1 instead of 2\. Set these keys, or select"
    ):
        resolve_model(MODEL, found(model=theirs, activation=Activation.gelu))


@pytest.mark.parametrize("name", ["vit_l14_336", "rn50", "siglip_b16", "chinese_clip_h14"])
def test_weights_of_another_model_are_refused_with_its_name_before_they_are_read(name: str) -> None:
    theirs = named_model(name).model_copy(update={"name": "downloads"})
    with pytest.raises(ConfigError, match=rf"w\.pt does not fit model=vit_nano: .*\. Set model={name}\."):
        resolve_model(MODEL, found(model=theirs, activation=Activation.gelu))
    larger = theirs.model_copy(update={"image": theirs.image.model_copy(update={"image_size": 512})})
    resolve_model(named_model(name), found(model=larger))  # positions are made to fit


def test_towers_of_other_libraries_are_compared_by_their_weights_alone() -> None:
    model = named_model("convnext_base")
    assert resolve_model(model, found(model=named_model("vit_b32"))).image == model.image


def test_the_pooling_of_an_encoder_is_compared() -> None:
    model = named_model("chinese_clip_b16")
    assert resolve_model(model, found(model=model)).text == model.text
    theirs = model.model_copy(update={"text": model.text.model_copy(update={"pooler": Pooler.mean})})
    with pytest.raises(ConfigError, match=r"model\.text\.pooler=mean instead of cls"):
        resolve_model(model, found(model=theirs))


def test_open_clips_architectures_have_their_own_activation_unless_the_weights_have_another(capsys) -> None:
    model = named_model("coca_ViT-B-32")
    assert resolve_model(model, found()).activation is None
    assert resolve_model(model, found(model=model)).activation is None
    assert capsys.readouterr().err == ""
    assert resolve_model(model, found(activation=Activation.quick_gelu)).activation is Activation.quick_gelu


def test_entries_of_the_registry_have_quick_gelu_if_marked_else_gelu_except_for_other_architectures() -> None:
    marked, plain = (open_clip_files.entry("ViT-B-32", tag) for tag in ("openai", "laion2b_s34b_b79k"))
    assert marked is not None
    assert plain is not None
    assert (activation_of_entry(marked, MODEL), activation_of_entry(plain, MODEL)) == (
        Activation.quick_gelu,
        Activation.gelu,
    )
    assert activation_of_entry(plain, MODEL.model_copy(update={"activation": Activation.gelu_tanh})) is None
    other = named_model("coca_ViT-B-32")
    assert (activation_of_entry(marked, other), activation_of_entry(plain, other)) == (Activation.quick_gelu, None)
    assert (
        activation_of_entry(plain, other.model_copy(update={"activation": Activation.quick_gelu})) is Activation.gelu
    ), "which contradicts it"


def test_a_resumed_run_uses_resolved_values_unless_they_are_set() -> None:
    earlier: ModelConfig = resolve_model(MODEL, found(activation=Activation.quick_gelu, mean=[0.5] * 3))
    assert as_resolved(MODEL, earlier) == earlier
    own = MODEL.model_copy(update={"activation": Activation.gelu})
    assert as_resolved(own, earlier).activation is Activation.gelu


def with_backbone(name: str, pretrained: bool = True) -> ModelConfig:
    image = TimmConfig(name=name, image_size=224, pretrained=pretrained)
    return ModelConfig(name="timm", embed_dim=64, image=image, text=CLIPTextConfig(width=8, layers=1, heads=1))


@pytest.mark.parametrize(
    ("name", "pretrained", "twin"),
    [
        ("vit_base_patch32_clip_224.openai", True, "vit_base_patch32_clip_quickgelu_224.openai"),
        ("vit_base_patch16_clip_224.metaclip_400m", True, "vit_base_patch16_clip_quickgelu_224.metaclip_400m"),
        ("vit_base_patch32_clip_224.openai", False, None),
        ("vit_base_patch32_clip_quickgelu_224.openai", True, None),
        ("vit_base_patch32_clip_224.laion2b", True, None),
        ("vit_tiny_patch16_224", True, None),
    ],
)
def test_a_backbone_with_another_activation_than_its_weights_is_reported(
    name: str, pretrained: bool, twin: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    note_architecture(with_backbone(name, pretrained))
    output = capsys.readouterr().err
    assert output.count(f"set model.image.name={twin}.") == (twin is not None)
    assert bool(output) == (twin is not None)
