from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from clip_exp.config.names import named_model
from clip_exp.errors import ConfigError, DataError
from clip_exp.evaluation.classification import build_classifier
from clip_exp.inference.pipeline import Pipeline
from clip_exp.models.clip import CLIP
from clip_exp.text.tokenizer import Tokenizer
from tests.small_runs import write_image


@pytest.fixture
def clip(nano: CLIP) -> Pipeline:
    return Pipeline(nano, named_model("vit_nano"), torch.device("cpu"))


@pytest.fixture
def images() -> list[Image.Image]:
    return [Image.new("RGB", (50, 40), color) for color in ("red", "green", "blue", "white", "black")]


def test_features_are_float32_of_unit_norm_and_do_not_depend_on_batches(clip: Pipeline, images: list[Image.Image]):
    whole = clip.encode_image(images)
    assert (whole.dtype, tuple(whole.shape)) == (torch.float32, (5, 64))
    torch.testing.assert_close(whole.norm(dim=1), torch.ones(5))
    clip.batch_size = 2
    torch.testing.assert_close(clip.encode_image(iter(images)), whole, atol=1e-6, rtol=0)
    text = clip.encode_text(["a dog", "a very long sentence about " + "many " * 100 + "dogs"])
    torch.testing.assert_close(text.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(clip.encode_text("a dog"), text[:1], atol=1e-6, rtol=0)


def test_probabilities_are_a_softmax_of_the_scaled_cosines(clip: Pipeline, nano: CLIP, images: list[Image.Image]):
    texts = ["a red square", "a dog"]
    expected = (nano.logit_scale.exp() * clip.encode_image(images) @ clip.encode_text(texts).T).softmax(dim=1)
    found = clip.classify(images, texts)
    torch.testing.assert_close(found, expected.detach())
    torch.testing.assert_close(found.sum(dim=1), torch.ones(5))
    assert clip.classify(images[0], texts).shape == (1, 2)


def test_templates_make_an_ensemble_for_each_label(clip: Pipeline, nano: CLIP, images: list[Image.Image]):
    names, prompts = ["cat", "dog", "cow"], ["a photo of a {}.", "art of the {}."]
    classifier = build_classifier(nano, Tokenizer(77), names, prompts)
    expected = (nano.logit_scale.detach().exp() * clip.encode_image(images) @ classifier.T).softmax(dim=1)
    torch.testing.assert_close(clip.classify(images, labels=names, templates=prompts), expected)
    assert not torch.equal(clip.classify(images, labels=names), expected)
    torch.testing.assert_close(clip.classify(images, labels=names), clip.classify(images, names), atol=0, rtol=0)


def test_texts_and_labels_exclude_each_other_and_templates_are_for_labels(clip: Pipeline, images: list[Image.Image]):
    for given in ({}, {"texts": ["a dog", "a cat"], "labels": ["dog", "cat"]}):
        with pytest.raises(ConfigError, match=r"give exactly one of texts and labels: .*labels=\["):
            clip.classify(images, **given)
    with pytest.raises(ConfigError, match=r"templates are for class names: give labels=\[…\] instead of texts"):
        clip.classify(images, ["a dog", "a cat"], templates="openai")


def test_the_module_takes_normalized_images_and_tokens(clip: Pipeline, images: list[Image.Image]):
    tokens = clip.tokenizer(["a dog"])
    torch.testing.assert_close(F.normalize(clip.model.encode_text(tokens), dim=-1).detach(), clip.encode_text("a dog"))


def test_features_can_train_something_on_top(clip: Pipeline, images: list[Image.Image]):
    probe = torch.nn.Linear(64, 1)
    probe(clip.encode_image(images)).sum().backward()
    assert probe.weight.grad is not None


def test_invalid_input_is_reported(clip: Pipeline, tmp_path: Path):
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"broken\.jpg: not an image"):
        clip.encode_image([write_image(tmp_path / "a.png", 0), tmp_path / "broken.jpg"])
    with pytest.raises(DataError, match=r"absent\.png: no such file"):
        clip.encode_image("absent.png")
    with pytest.raises(ConfigError, match=r"is a folder: list its images with clip_exp\.find_images"):
        clip.encode_image(tmp_path)
    with pytest.raises(DataError, match="no images"):
        clip.encode_image([])
    with pytest.raises(ConfigError, match="must be non-empty lists"):
        clip.classify(write_image(tmp_path / "a.png", 0), "a dog")
