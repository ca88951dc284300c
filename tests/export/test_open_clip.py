"""Tests that open_clip loads an export with equal features."""

import json
from collections.abc import Callable
from pathlib import Path

import open_clip
import pytest
import timm
import torch
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from PIL import Image
from torch import nn

import clip_exp
from clip_exp import open_clip_files
from clip_exp.config.model import Activation, ModelConfig, Projection
from clip_exp.config.names import named_model
from clip_exp.data.images import eval_transform, normalize, preprocessing_of
from clip_exp.export.open_clip import model_cfg
from clip_exp.models.clip import CLIP
from clip_exp.models.families.timm import TimmConfig
from clip_exp.text.tokenizer import build_tokenizer
from tests.encoders import write_siglip_tokenizer
from tests.exhaustive import repeat_beyond
from tests.export.small import TEXTS, build, images, resnet, siglip, vit
from tests.models.twins import names_with_twin
from tests.small_runs import write_image

Export = Callable[..., Path]


def assert_same_features(theirs: nn.Module, model: CLIP, config: ModelConfig) -> None:
    image, tokens = images(config), build_tokenizer(config.text)(TEXTS)
    whole = torch.nn.functional.pad(tokens, (0, config.text.context_length - tokens.shape[1]))  # what open_clip takes
    torch.testing.assert_close(theirs.encode_image(image), model.encode_image(image), atol=1e-5, rtol=0)
    torch.testing.assert_close(theirs.encode_text(whole), model.encode_text(tokens), atol=1e-5, rtol=0)
    torch.testing.assert_close(theirs.logit_scale.reshape(1), model.logit_scale)


def assert_same_image(preprocess: Callable, config: ModelConfig, tmp_path: Path) -> None:
    for number, size in enumerate([(40, 36), (90, 201), (20, 31)]):
        with Image.open(write_image(tmp_path / f"{number}.png", number, size)) as image:
            wanted = preprocessing_of(config.image)
            pixels = eval_transform(image, wanted.size, wanted.interpolation, wanted.resize_mode)
            ours = normalize(pixels[None], wanted.mean, wanted.std)[0]
            torch.testing.assert_close(preprocess(image), ours, atol=0, rtol=0)


@pytest.mark.parametrize("activation", [None, *Activation])
def test_a_vit_is_loaded_from_the_folder_with_equal_features_pixels_and_ids(
    activation: Activation | None, export: Export, tmp_path: Path
) -> None:
    config = vit(activation)
    model = build(config)
    folder = export(model, config, "open_clip")
    theirs, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    assert_same_features(theirs.eval(), model, config)
    assert_same_image(preprocess, config, tmp_path)
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    assert torch.equal(tokenizer(TEXTS), build_tokenizer(config.text)(TEXTS, trim=False))


def test_a_resnet_is_loaded_from_the_folder(export: Export, tmp_path: Path) -> None:
    config = resnet()
    model = build(config)
    theirs, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{export(model, config, 'open_clip')}")
    assert_same_features(theirs.eval(), model, config)
    assert_same_image(preprocess, config, tmp_path)


def test_the_file_is_loaded_strictly_as_an_architecture_of_that_name(
    export: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Like `open_clip.create_model("ViT-B-32", pretrained=file)`, with the configuration of vit_nano registered in open_clip."""
    config = vit(Activation.quick_gelu)
    model = build(config)
    folder = export(model, config, "open_clip")
    numbers = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    # As `open_clip.add_model_config` would, for this test alone.
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", {"ViT-nano": numbers})
    theirs = open_clip.create_model("ViT-nano", pretrained=str(folder / "open_clip_model.safetensors"))
    assert_same_features(theirs.eval(), model, config)


@pytest.mark.parametrize("name", names_with_twin())
def test_the_configuration_of_an_architecture_is_open_clips_own(name: str) -> None:
    config = named_model(name)
    bias = -10.0 if config.image.kind == "siglip" else None
    ours, theirs = model_cfg(config, bias), open_clip.get_model_config(config.open_clip_name)
    for part, fields in (("vision_cfg", CLIPVisionCfg), ("text_cfg", CLIPTextCfg)):
        assert fields(**ours.pop(part)) == fields(**theirs.pop(part))
    assert ours.pop("quick_gelu") is theirs.pop("quick_gelu", False)
    assert ours == theirs


FULL_SIZE = {"vit_b32": "ViT-B-32", "vit_b16": "ViT-B-16", "rn50": "RN50", "siglip_b16": "ViT-B-16-SigLIP"}


@pytest.mark.parametrize("name", repeat_beyond(("rn50",), FULL_SIZE))
def test_a_published_architecture_at_full_size(name: str, export: Export, tmp_path: Path) -> None:
    config = named_model(name)
    if config.text.tokenizer is not None:  # the published one is on the hub
        config.text.tokenizer = str(write_siglip_tokenizer(tmp_path / "tokenizer"))
    bias = -10.0 if name.startswith("siglip") else None
    model = build(config, bias)
    folder = export(model, config, "open_clip")
    twin = open_clip.create_model(FULL_SIZE[name], pretrained=str(folder / "open_clip_model.safetensors"))
    assert_same_features(twin.eval(), model, config)


def test_the_bias_of_a_sigmoid_loss_goes_along(export: Export) -> None:
    config = vit()
    model = build(config, bias=-7.5)
    theirs = open_clip.create_model(f"local-dir:{export(model, config, 'open_clip')}").eval()
    assert theirs.logit_bias.item() == -7.5
    assert_same_features(theirs, model, config)


@pytest.fixture
def tiny_backbone(monkeypatch: pytest.MonkeyPatch) -> str:
    """Register a small SigLIP backbone in timm, and an architecture of open_clip with it, since the published ones are large."""
    from timm.models import _registry, vision_transformer

    def vit_nano_siglip(num_classes: int, global_pool: str, **about: object) -> nn.Module:
        numbers = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4, "class_token": False}
        return vision_transformer.VisionTransformer(**numbers, num_classes=num_classes, global_pool=global_pool)

    monkeypatch.setitem(_registry._model_entrypoints, "vit_nano_siglip", vit_nano_siglip)
    monkeypatch.setitem(_registry._model_to_module, "vit_nano_siglip", "vision_transformer")
    configuration = {
        "embed_dim": 64,
        "vision_cfg": {"image_size": 32, "timm_model_name": "vit_nano_siglip", "timm_pool": "map", "timm_proj": "none"},
        "text_cfg": {"context_length": 16, "vocab_size": 300, "width": 64, "heads": 4, "layers": 2},
    }
    monkeypatch.setattr(open_clip_files, "configurations", lambda: ["ViT-nano-SigLIP"])
    monkeypatch.setattr(open_clip_files, "configuration", lambda name: configuration)
    return "ViT-nano-SigLIP"


def test_a_siglip_model_is_loaded_with_its_tokenizer(export: Export, tmp_path: Path, tiny_backbone: str) -> None:
    config = siglip(tmp_path / "tokenizer")
    config.open_clip_name = tiny_backbone
    model = build(config, bias=-10.0)
    folder = export(model, config, "open_clip")
    theirs, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    assert_same_features(theirs.eval(), model, config)
    assert_same_image(preprocess, config, tmp_path)
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    assert torch.equal(
        tokenizer([*TEXTS, "It's UPPER_case!"]), build_tokenizer(config.text)([*TEXTS, "It's UPPER_case!"])
    )
    assert theirs.logit_bias.item() == -10.0


@pytest.mark.parametrize("projection", [Projection.linear, Projection.mlp])
def test_a_timm_backbone_is_loaded(projection: Projection, export: Export) -> None:
    config = vit()
    config.image = TimmConfig(name="test_convnext", image_size=64, projection=projection)
    assert timm.is_model("test_convnext")
    model = build(config)
    theirs = open_clip.create_model(f"local-dir:{export(model, config, 'open_clip')}").eval()
    assert_same_features(theirs, model, config)


def test_a_model_of_open_clip_goes_back(export: Export) -> None:
    """By its folder, and by its name with the file, whose parameter names are those of open_clip's class for the model."""
    config = named_model("ViT-S-32-alt")
    assert config.image.kind == "open_clip"
    model = build(config)
    folder = export(model, config, "open_clip")
    assert_same_features(open_clip.create_model(f"local-dir:{folder}").eval(), model, config)
    file = str(folder / "open_clip_model.safetensors")
    assert_same_features(open_clip.create_model("ViT-S-32-alt", pretrained=file).eval(), model, config)
    back = clip_exp.load("ViT-S-32-alt", pretrained=file, accelerator="cpu").model.state_dict()
    assert all(torch.equal(back[name], tensor) for name, tensor in model.state_dict().items())


def test_clip_exp_reads_its_export_back_as_the_same_model(export: Export) -> None:
    config = vit(Activation.quick_gelu)
    model = build(config)
    clip = clip_exp.load(export(model, config, "open_clip"), accelerator="cpu")
    assert clip.config.activation is Activation.quick_gelu
    assert all(torch.equal(clip.model.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
