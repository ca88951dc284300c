"""Tests of exporting every architecture, with two layers, to transformers and onnxruntime; for open_clip see tests/weights/test_open_clip.py.

`make test` runs only transformers and a representative of each family; those of onnxruntime are in test_onnx.py.
"""

from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import Tensor
from transformers import CLIPModel, SiglipModel

from clip_exp.config.model import ModelConfig
from clip_exp.export import huggingface as huggingface_format
from clip_exp.export import onnx as onnx_format
from clip_exp.models.clip import CLIP
from clip_exp.weights.names import to_ours
from tests.encoders import write_siglip_tokenizer
from tests.exhaustive import repeat_beyond
from tests.export.small import build
from tests.models.twins import REPRESENTATIVES, cut, inputs, load_config, names_with_twin

AT_FULL_SIZE = {"rn50", "vit_b32", "vit_b16", "siglip_b16"}  # in test_onnx.py
OTHERS = [name for name in names_with_twin() if name not in AT_FULL_SIZE]
IN_TRANSFORMERS = [name for name in names_with_twin() if load_config(name).image.kind != "resnet"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Create a tokenizer to replace SigLIP's, which is on the hub."""
    return str(write_siglip_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def config(request: pytest.FixtureRequest, tokenizer: str) -> ModelConfig:
    config = cut(load_config(request.param))
    if config.text.tokenizer is not None:
        config.text.tokenizer = tokenizer
    return config


@pytest.fixture
def model(config: ModelConfig) -> CLIP:
    return build(config, bias=-10.0 if config.image.kind == "siglip" else None)


def assert_same(features: tuple[Tensor, Tensor], model: CLIP, given: tuple[Tensor, Tensor]) -> None:
    expected = (model.encode_image(given[0]), model.encode_text(given[1]))
    assert all(feature.std() > 1e-2 for feature in expected)  # or any two would be close
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", repeat_beyond(REPRESENTATIVES, IN_TRANSFORMERS), indirect=True)
def test_transformers_loads_the_folder_and_its_weights_come_back(
    config: ModelConfig, model: CLIP, tmp_path: Path
) -> None:
    huggingface_format.write(tmp_path, model, config)
    model_class = SiglipModel if config.image.kind == "siglip" else CLIPModel
    theirs, info = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    given = inputs(config)
    features = (theirs.get_image_features(given[0]), theirs.get_text_features(given[1]))
    assert_same(tuple(feature.pooler_output for feature in features), model, given)
    back = to_ours("transformers", theirs.state_dict())
    assert back.keys() == model.state_dict().keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("config", repeat_beyond((), OTHERS), indirect=True)
def test_onnxruntime_gives_its_features_for_another_batch(config: ModelConfig, model: CLIP, tmp_path: Path) -> None:
    onnx_format.write(tmp_path, model, config)
    given = inputs(config, size=3)
    expected = (model.encode_image(given[0], normalize=True), model.encode_text(given[1], normalize=True))
    for tower, name, value, wanted in zip(("image", "text"), ("image", "tokens"), given, expected, strict=True):
        (found,) = onnxruntime.InferenceSession(tmp_path / f"{tower}.onnx").run(None, {name: value.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), wanted, atol=1e-4, rtol=0)
