"""Tests that onnxruntime computes equal features, with other batch sizes and lengths than the traced ones."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from tokenizers import Tokenizer

from clip_exp import open_clip_files
from clip_exp.config.commands import ExportFormat
from clip_exp.config.model import ModelConfig
from clip_exp.config.names import named_model
from clip_exp.export import formats
from clip_exp.export.write import write_export
from clip_exp.models.clip import CLIP
from clip_exp.models.families.huggingface import HuggingFaceTextConfig
from clip_exp.models.families.timm import TimmConfig
from clip_exp.text.tokenizer import build_tokenizer
from tests.encoders import write_encoder, write_siglip_tokenizer
from tests.exhaustive import repeat_beyond
from tests.export.small import TEXTS, build, images, resnet, siglip, vit

Export = Callable[..., Path]


def assert_same_towers(
    folder: Path, model: CLIP, config: ModelConfig, lengths: list[int], batches: tuple[int, ...] = (1, 3, 7)
) -> None:
    sessions = {tower: onnxruntime.InferenceSession(folder / f"{tower}.onnx") for tower in ("image", "text")}

    def assert_close(tower: str, value: torch.Tensor, expected: torch.Tensor) -> None:
        given = {"image" if tower == "image" else "tokens": value.numpy()}
        (found,) = sessions[tower].run([f"{tower}_features"], given)
        torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-4, rtol=0)

    for count in batches:
        seen = images(config, count)
        assert_close("image", seen, model.encode_image(seen, True))
        for length in lengths:
            tokens = torch.randint(3, 200, (count, length), generator=torch.Generator().manual_seed(length))
            if config.text.kind == "clip":
                tokens[:, -1] = config.text.vocab_size - 1
            assert_close("text", tokens, model.encode_text(tokens, True))


@pytest.fixture(scope="module")
def vit_model() -> CLIP:
    return build(vit())


@pytest.fixture(scope="module")
def vit_folder(vit_model: CLIP, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("vit") / "exported"
    return write_export(vit_model, vit(), None, target, ExportFormat.onnx).folder


def test_a_vit_and_texts_of_any_length(vit_model: CLIP, vit_folder: Path) -> None:
    assert_same_towers(vit_folder, vit_model, vit(), lengths=[2, 9, 76, 77])


@pytest.mark.exhaustive
def test_a_resnet(export: Export) -> None:
    config = resnet()
    model = build(config)
    assert_same_towers(export(model, config, "onnx"), model, config, lengths=[5])


@pytest.mark.exhaustive
def test_siglip_towers_and_texts_as_long_as_the_context(export: Export, tmp_path: Path) -> None:
    config = siglip(tmp_path / "tokenizer")
    model = build(config, bias=-10.0)
    folder = export(model, config, "onnx")
    assert_same_towers(folder, model, config, lengths=[16])
    about = json.loads((folder / "clip_config.json").read_text())
    assert about["text_length"] == "context_length"
    assert about["logit_bias"] == -10.0
    cleaned = ["a photo of a cat", "the digit 7"]
    encoded = Tokenizer.from_file(str(folder / "tokenizer.json")).encode_batch(cleaned)
    assert [text.ids for text in encoded] == build_tokenizer(config.text)(cleaned).tolist()


@pytest.mark.exhaustive
def test_towers_of_other_libraries(export: Export, tmp_path: Path) -> None:
    config = vit()
    config.image = TimmConfig(name="test_convnext", image_size=64)
    config.text = HuggingFaceTextConfig(name=str(write_encoder(tmp_path / "encoder", "bert")), context_length=20)
    model = build(config)
    assert_same_towers(export(model, config, "onnx"), model, config, lengths=[20])


@pytest.mark.parametrize("name", repeat_beyond((), ("rn50", "vit_b32", "vit_b16", "siglip_b16")))
def test_a_published_architecture_at_full_size(name: str, export: Export, tmp_path: Path) -> None:
    config = named_model(name)
    if config.text.tokenizer is not None:  # the published one is on the hub
        config.text.tokenizer = str(write_siglip_tokenizer(tmp_path / "tokenizer"))
    model = build(config)
    assert_same_towers(
        export(model, config, "onnx"), model, config, lengths=[config.text.context_length], batches=(1, 3)
    )


@pytest.mark.exhaustive
def test_towers_of_open_clip(export: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    """The towers have two layers, since the time of tracing is proportional to their number."""
    settings = open_clip_files.configuration("ViT-S-32-alt")
    for tower in ("vision_cfg", "text_cfg"):
        settings[tower]["layers"] = 2
    monkeypatch.setattr(open_clip_files, "configuration", lambda _: copy.deepcopy(settings))
    config = named_model("ViT-S-32-alt")
    model = build(config)
    assert_same_towers(export(model, config, "onnx"), model, config, lengths=[77])


def test_the_axes_have_names_and_the_files_no_path_of_this_machine(vit_folder: Path, repository: Path) -> None:
    for name, axes in (("image", ["batch", 3, 32, 32]), ("text", ["batch", "length"])):
        model = onnx.load(vit_folder / f"{name}.onnx")
        onnx.checker.check_model(model)
        shape = model.graph.input[0].type.tensor_type.shape.dim
        assert [axis.dim_param or axis.dim_value for axis in shape] == axes
        content = (vit_folder / f"{name}.onnx").read_bytes()
        assert str(repository).encode() not in content
        assert b"clip_exp/" not in content
    assert not list(vit_folder.glob("*.data"))


def test_the_tokenizer_gives_the_input_as_it_is(vit_folder: Path) -> None:
    texts = [*TEXTS, "word " * 100]
    encoded = Tokenizer.from_file(str(vit_folder / "tokenizer.json")).encode_batch(texts)
    assert np.array_equal([text.ids for text in encoded], build_tokenizer(vit().text)(texts).numpy())


def test_the_scale_that_turns_cosines_into_logits_is_noted(vit_model: CLIP, vit_folder: Path) -> None:
    about = json.loads((vit_folder / "clip_config.json").read_text())
    assert about["logit_scale"] == pytest.approx(vit_model.logit_scale.exp().item())
    assert about["logit_bias"] is None
    assert (about["context_length"], about["text_length"]) == (77, "any")


def test_what_is_not_installed_is_named_before_anything_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "ONNX_NEEDS", ("onnxscript", "onnxruntime_that_is_not_there"))
    (problem,) = formats.problems_of(ExportFormat.onnx, vit())
    assert "format=onnx needs onnxruntime_that_is_not_there: pip install 'clip_exp[onnx]'" in problem
