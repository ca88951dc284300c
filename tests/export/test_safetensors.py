"""Tests of exports in clip_exp's own format, whose file contains the model's configuration."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import clip_exp
from clip_exp.config.model import Activation, ModelConfig, Pooler
from clip_exp.models.families.huggingface import HuggingFaceTextConfig
from clip_exp.models.families.timm import TimmConfig
from clip_exp.text.tokenizer import build_tokenizer
from tests.encoders import write_encoder
from tests.export.small import TEXTS, build, resnet, siglip, vit
from tests.small_runs import write_image

Export = Callable[..., Path]


def test_a_file_alone_is_a_model(export: Export, tmp_path: Path) -> None:
    config = resnet()
    config.activation = Activation.quick_gelu
    model = build(config)
    alone = tmp_path / "elsewhere.safetensors"
    shutil.copy(export(model, config, "safetensors") / "model.safetensors", alone)
    clip = clip_exp.load(alone, accelerator="cpu")
    assert clip.config == config
    assert all(torch.equal(clip.model.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_the_folder_is_a_model_that_can_be_moved_with_its_tokenizer(export: Export, tmp_path: Path) -> None:
    config = siglip(tmp_path / "tokenizer")
    model = build(config, bias=-10.0)
    ids = build_tokenizer(config.text)(TEXTS)
    folder = export(model, config, "safetensors").rename(tmp_path / "moved")
    shutil.rmtree(tmp_path / "tokenizer")
    clip = clip_exp.load(folder, accelerator="cpu")
    assert torch.equal(clip.tokenizer(TEXTS), ids)
    assert clip.model.logit_bias.item() == -10.0
    assert torch.equal(clip.model.encode_text(ids), model.encode_text(ids))


def test_towers_of_other_libraries_are_built_without_their_files(export: Export, tmp_path: Path) -> None:
    encoder = write_encoder(tmp_path / "encoder", "bert")
    config: ModelConfig = vit()
    config.image = TimmConfig(name="test_convnext", image_size=64)
    config.text = HuggingFaceTextConfig(name=str(encoder), pooler=Pooler.cls, context_length=20)
    model = build(config)
    folder = export(model, config, "safetensors")
    ids = build_tokenizer(config.text)(TEXTS)
    shutil.rmtree(encoder)
    clip = clip_exp.load(folder, accelerator="cpu")
    assert torch.equal(clip.tokenizer(TEXTS), ids)
    assert torch.equal(clip.model.encode_text(ids), model.encode_text(ids))


def test_nothing_in_it_contains_a_path_of_this_machine(export: Export, tmp_path: Path) -> None:
    config = siglip(tmp_path / "tokenizer")
    folder = export(build(config, bias=-10.0), config, "safetensors")
    with safe_open(folder / "model.safetensors", "pt") as file:
        metadata = json.loads(file.metadata()["clip_exp.model"])
    assert metadata["text"]["tokenizer"] == "."
    for path in folder.iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path.name


def test_files_of_exports_and_checkpoints_have_the_permissions_of_the_umask(export: Export, run_dir: Path) -> None:
    """The safetensors library creates files that only their owner can read."""
    config = vit()
    folder = export(build(config), config, "safetensors")
    mask = os.umask(0)
    os.umask(mask)
    files = [*folder.iterdir(), *(run_dir / "checkpoints" / "step-000001").iterdir()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~mask}


@pytest.mark.parametrize("chosen", ["open_clip", "huggingface", "safetensors"])
def test_an_export_is_weights_that_an_evaluation_takes(chosen: str, run_dir: Path, tmp_path: Path) -> None:
    for number in range(2):
        write_image(tmp_path / "images" / f"class {number}" / "a.png", number)
    folder = clip_exp.load(run_dir, accelerator="cpu").export(tmp_path / "exported", chosen)
    task = [
        "task=image_folder",
        f"task.image_folder.root={tmp_path / 'images'}",
        "task.image_folder.templates=simple",
    ]
    common = [*task, "num_workers=0", "accelerator=cpu", "cache_gb=0", f"output_dir={tmp_path}"]
    results = [
        clip_exp.evaluate(*which, *common)["image_folder"]["metrics"]
        for which in ([f"run={run_dir}"], ["model=vit_nano", f"pretrained={folder}"], [f"pretrained={folder}"])
    ]
    assert results[0] == results[1] == results[2]
