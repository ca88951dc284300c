"""Tests that transformers loads an export with equal features."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, CLIPModel, CLIPProcessor, SiglipModel

import clip_exp
from clip_exp.config.model import Activation, ModelConfig, ResizeMode
from clip_exp.data.images import eval_transform, normalize, preprocessing_of
from clip_exp.errors import ConfigError
from clip_exp.models.clip import CLIP
from clip_exp.models.families.timm import TimmConfig
from clip_exp.text.tokenizer import build_tokenizer
from tests.export.small import TEXTS, build, images, resnet, siglip, vit
from tests.small_runs import write_image

Export = Callable[..., Path]


def image_features(theirs: torch.nn.Module, image: torch.Tensor) -> torch.Tensor:
    return theirs.get_image_features(pixel_values=image).pooler_output


def text_features(theirs: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return theirs.get_text_features(input_ids=tokens).pooler_output


@pytest.mark.parametrize("activation", [None, *Activation])
def test_a_vit_is_loaded_with_equal_features(activation: Activation | None, export: Export) -> None:
    config = vit(activation)
    model = build(config)
    theirs, info = CLIPModel.from_pretrained(export(model, config, "huggingface"), output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    image, tokens = images(config), build_tokenizer(config.text)(TEXTS)
    torch.testing.assert_close(image_features(theirs.eval(), image), model.encode_image(image), atol=1e-5, rtol=0)
    torch.testing.assert_close(text_features(theirs, tokens), model.encode_text(tokens), atol=1e-5, rtol=0)
    torch.testing.assert_close(theirs.logit_scale.reshape(1), model.logit_scale)


@pytest.mark.parametrize("load", [CLIPProcessor.from_pretrained, AutoProcessor.from_pretrained])
def test_its_processor_gives_our_ids(load: Callable, export: Export) -> None:
    config = vit()
    processor = load(export(build(config), config, "huggingface"))
    texts = [*TEXTS, "A  Café\n in Zürich!?", "一只猫坐在垫子上", "don't ... 'tis 100% (ok)", "very " * 100]
    ours = build_tokenizer(config.text)
    for text in texts:
        assert processor(text=text, truncation=True)["input_ids"] == ours.encode(text)


def pixels_of(image: Image.Image, config: ModelConfig) -> torch.Tensor:
    wanted = preprocessing_of(config.image)
    pixels = eval_transform(image, wanted.size, wanted.interpolation, wanted.resize_mode)
    return normalize(pixels[None], wanted.mean, wanted.std)[0]


@pytest.mark.parametrize("resize_mode", list(ResizeMode))
def test_its_processor_gives_our_pixels(resize_mode: ResizeMode, export: Export, tmp_path: Path) -> None:
    """Except for rounding with Pillow. By default, transformers resizes with torch, which differs by up to 2 of 255 levels.

    The sizes here avoid a remainder of 3, 7, 11, … pixels after the crop, for which transformers crops the odd pixel on the other side.
    """
    config = vit()
    config.image.resize_mode = resize_mode
    folder = export(build(config), config, "huggingface")
    std = min(preprocessing_of(config.image).std)
    for backend, tolerance in (("pil", 1e-5), ("torchvision", 2.01 / 255 / std)):
        processor = AutoProcessor.from_pretrained(folder, backend=backend)
        for number, size in enumerate([(34, 32), (90, 203), (20, 31)]):
            with Image.open(write_image(tmp_path / f"{number}.png", number, size)) as image:
                theirs = processor(images=image, return_tensors="pt")["pixel_values"][0]
                torch.testing.assert_close(theirs, pixels_of(image, config), atol=tolerance, rtol=0)


def test_a_siglip_model_is_loaded_with_its_processor(export: Export, tmp_path: Path) -> None:
    config = siglip(tmp_path / "tokenizer")
    model = build(config, bias=-10.0)
    folder = export(model, config, "huggingface")
    theirs, info = SiglipModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    image, tokens = images(config), build_tokenizer(config.text)(TEXTS)
    torch.testing.assert_close(image_features(theirs.eval(), image), model.encode_image(image), atol=1e-5, rtol=0)
    torch.testing.assert_close(text_features(theirs, tokens), model.encode_text(tokens), atol=1e-5, rtol=0)
    assert theirs.logit_bias.item() == -10.0
    processor = AutoProcessor.from_pretrained(folder)
    cleaned = ["a photo of a cat", "a dog running on grass", "the digit 7"]
    ids = processor(text=cleaned, padding="max_length", truncation=True, max_length=16, return_tensors="pt")[
        "input_ids"
    ]
    assert torch.equal(ids, build_tokenizer(config.text)(cleaned))
    with Image.open(write_image(tmp_path / "a.png", 1, (50, 40))) as opened:
        pixels = processor(images=opened, return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(pixels, pixels_of(opened, config), atol=2.01 / 255 / 0.5, rtol=0)


def test_clip_exp_reads_its_export_back_as_the_same_model(export: Export, tmp_path: Path) -> None:
    config = siglip(tmp_path / "tokenizer")
    model = build(config, bias=-10.0)
    clip = clip_exp.load(export(model, config, "huggingface"), accelerator="cpu")
    assert all(torch.equal(clip.model.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(clip.tokenizer(TEXTS), build_tokenizer(config.text)(TEXTS))


def test_a_bias_that_clip_model_lacks_is_left_out(export: Export) -> None:
    config = vit()
    theirs, info = CLIPModel.from_pretrained(
        export(build(config, bias=-5.0), config, "huggingface"), output_loading_info=True
    )
    assert not info["unexpected_keys"]
    assert not hasattr(theirs, "logit_bias")


@pytest.mark.parametrize("kind", ["resnet", "timm"])
def test_other_towers_are_refused_with_the_supported_formats(kind: str, export: Export, tmp_path: Path) -> None:
    config = resnet()
    model: CLIP = build(config)
    if kind == "timm":
        config.image = TimmConfig(name="test_convnext", image_size=64)
    with pytest.raises(
        ConfigError, match=f"kind={kind} and a text tower of kind=clip. Supported formats: open_clip, safetensors, onnx"
    ):
        export(model, config, "huggingface")
    assert not list(tmp_path.iterdir())
