"""Runs with towers of other libraries, by the command line."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import clip_exp
from clip_exp.checkpoints.discovery import latest
from tests.encoders import write_encoder
from tests.runs import Train

SHORT = (
    "model=vit_nano", "data=digits", "task=digits", "max_steps=3", "global_batch_size=16", "log_every_n_steps=1",
    "precision=32-true", "trainer.accelerator=cpu", "optimizer.lr=1e-3", "resume=never",
)  # fmt: skip
TIMM = ("model/image=timm", "model.image.name=test_vit", "model.image.image_size=64")


def evaluated(command, source: str, output_dir: Path) -> dict[str, float]:
    """`digits/top1` and the like of a finished run, by `evaluate.py`."""
    result = command(
        "evaluate.py",
        source,
        "task=digits",
        "accelerator=cpu",
        "num_workers=0",
        f"output_dir={output_dir}",
        cwd=output_dir,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    folder = max(output_dir.glob("evaluate/*/*"))
    return json.loads((folder / "eval" / "digits.json").read_text())["metrics"]


def scored(folder: Path) -> dict[str, float]:
    """The same, measured by the run itself at its end."""
    return json.loads((folder / "eval" / "digits.json").read_text())["metrics"]


@pytest.mark.slow
def test_a_backbone_of_timm_trains_and_scores_the_same_afterwards(train: Train, command, tmp_path: Path) -> None:
    run = train(*SHORT, *TIMM)
    assert run.losses[-1] < run.losses[0]
    assert "image.trunk.blocks.0.attn.qkv.weight" in run.weights
    assert evaluated(command, f"run={run.folder}", tmp_path) == pytest.approx(scored(run.folder))


@pytest.mark.slow
def test_a_run_with_an_encoder_of_hugging_face_needs_neither_its_folder_nor_its_place(
    train: Train, command, tmp_path: Path
) -> None:
    encoder = write_encoder(tmp_path / "encoder", "bert")
    run = train(*SHORT, "model/text=huggingface", f"model.text.name={encoder}", "model.text.context_length=20")
    own = clip_exp.load(run.folder, accelerator="cpu")
    texts = ["一只猫坐在垫子上", "the digit 3"]
    expected = own.encode_text(texts)
    assert not torch.allclose(expected[0], expected[1], atol=1e-3)
    shutil.rmtree(encoder)
    moved = run.folder.rename(tmp_path / "moved")
    assert evaluated(command, f"run={moved}", tmp_path) == pytest.approx(scored(moved))
    assert torch.equal(clip_exp.load(moved, accelerator="cpu").encode_text(texts), expected)
    weights = latest(moved) / "model.safetensors"
    assert torch.equal(clip_exp.load(weights, accelerator="cpu").encode_text(texts), expected)


@pytest.mark.slow
def test_a_configuration_of_open_clip_trains_and_scores_the_same_afterwards(
    train: Train, command, tmp_path: Path
) -> None:
    run = train(*SHORT[1:], "model=open_clip", "model.name=ViT-S-32-alt", "model.image.image_size=64")
    assert "image.transformer.resblocks.0.attn.in_proj_weight" in run.weights
    assert evaluated(command, f"run={run.folder}", tmp_path) == pytest.approx(scored(run.folder))


@pytest.mark.slow
def test_every_strategy_trains_towers_of_other_libraries_alike(train: Train, tmp_path: Path) -> None:
    encoder = write_encoder(tmp_path / "encoder", "xlm-roberta")
    overrides = (*SHORT, *TIMM, "model/text=huggingface", f"model.text.name={encoder}", "model.text.context_length=20")
    single = train(*overrides)
    for strategy in ("ddp", "deepspeed_stage_3"):
        run = train(*overrides, f"strategy={strategy}", "trainer.devices=2")
        assert run.losses == pytest.approx(single.losses, rel=1e-5), strategy
        assert scored(run.folder) == pytest.approx(scored(single.folder), abs=5e-3)


def test_an_encoder_that_is_not_there_ends_with_code_2_and_leaves_no_folder(command, tmp_path: Path) -> None:
    result = command(
        "train.py", *SHORT[3:], "model=vit_nano", "model/text=huggingface", f"model.text.name={tmp_path}/none", cwd=tmp_path
    )  # fmt: skip
    assert result.returncode == 2, result.stderr
    assert f"model.text.name={tmp_path}/none cannot be had (FileNotFoundError" in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []
