"""Tests that need one or two GPUs, for about five minutes: `pytest -m gpu`. They are skipped on other machines."""

import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from clip_exp.checkpoints.folders import checkpoints, step_of
from clip_exp.config.names import named_model
from clip_exp.models.clip import build_model
from tests.conftest import REPOSITORY, Run
from tests.runs import TINY, Finished, run_folders
from tests.small_runs import write_image

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU"),
]
SMALL = (*(o for o in TINY if not o.startswith(("trainer.accelerator", "resume"))), "trainer.accelerator=gpu")
RARELY = ("log_every_n_steps=100000", "val_every_n_steps=100000", "checkpoint_every_n_steps=100000")


def train(command: Run, *overrides: str, output_dir: Path, **environment: str) -> Finished:
    """Train in a new process, since a forked one could not use the GPU if its parent has initialized CUDA."""
    arguments = (*overrides, f"output_dir={output_dir}")
    result = command("train.py", *arguments, cwd=output_dir, cold=True, timeout_s=600, **environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return Finished(run_folders(output_dir)[-1], result.stdout)


def train_until_stopped(*overrides: str, output_dir: Path) -> Finished:
    """Train until the first row of metrics is written, and stop with SIGTERM."""
    process = subprocess.Popen(
        [sys.executable, str(REPOSITORY / "train.py"), *overrides, f"output_dir={output_dir}"],
        cwd=output_dir, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 300
        while not list(output_dir.glob("train/*/*/metrics.csv")) and time.monotonic() < deadline:
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 143, output
    return Finished(run_folders(output_dir)[-1], output)


@pytest.mark.parametrize("strategy", ["ddp", "deepspeed_stage_2"])
def test_a_run_that_is_stopped_and_resumed_has_the_losses_of_one_that_was_not(
    strategy: str, command: Run, tmp_path: Path
) -> None:
    devices = min(2, torch.cuda.device_count())
    run = (
        *SMALL, "resume=auto", f"strategy={strategy}", f"trainer.devices={devices}", "max_steps=400", "log_every_n_steps=1",
        "val_every_n_steps=100000", "checkpoint_every_n_steps=100000",
    )  # fmt: skip
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    whole = train(command, *run, output_dir=tmp_path / "whole")
    stopped = train_until_stopped(*run, output_dir=tmp_path / "stopped")
    (saved,) = checkpoints(stopped.folder)
    resumed = train(command, *run, output_dir=tmp_path / "stopped")
    assert resumed.folder == stopped.folder
    assert len(resumed.losses) == len(whole.losses) == 400
    # Atomic additions differ from run to run, and a small model that has learned its data by heart makes much of that.
    compared = slice(0, step_of(saved) + 10)
    assert resumed.losses[compared] == pytest.approx(whole.losses[compared], rel=1e-3)


class RaiseWhereTheGPUIsAwaited(pl.Callback):
    """Callback that makes every operation that waits for the GPU fail, from the step after `first` to the end of step `last`."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int
    ) -> None:
        if trainer.global_step == self.first:
            torch.cuda.set_sync_debug_mode("error")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        if trainer.global_step == self.last:
            torch.cuda.set_sync_debug_mode("default")
            print("no step waited")


@pytest.mark.parametrize("more", [[], ["callbacks.ema_decay=0.9"]], ids=["plain", "averaged"])
def test_steps_that_are_not_logged_never_wait_for_the_gpu(more: list[str], command: Run, tmp_path: Path) -> None:
    target = f"{RaiseWhereTheGPUIsAwaited.__module__}.{RaiseWhereTheGPUIsAwaited.__name__}"
    run = train(
        command,
        *(o for o in SMALL if not o.startswith(("precision", "data.num_workers"))),
        *RARELY,
        *more,
        "resume=never",
        "precision=bf16-mixed",
        "data.num_workers=1",
        "max_steps=25",
        f"+callbacks.extra.sync={{_target_: {target}, first: 3, last: 20}}",
        output_dir=tmp_path,
        PYTHONPATH=str(REPOSITORY),
        CLIP_EXP_ALLOWED_TARGETS="tests",
    )
    assert "no step waited" in run.output
    assert len(run.losses) == 2


def test_a_batch_that_is_too_large_ends_with_code_7_and_names_the_remedy(command: Run, tmp_path: Path) -> None:
    """In float32 the activations of 1,024 images take about 500 GB."""
    result = command(
        "train.py", "model=vit_l14", "data=shapes", "data.generate.rows=1024", "data.generate.val_rows=8", "global_batch_size=1024",
        "max_steps=1", "precision=32-true", "trainer.accelerator=gpu", "resume=never", "data.num_workers=0",
        f"output_dir={tmp_path}", cwd=tmp_path, cold=True, timeout_s=600,
    )  # fmt: skip
    assert result.returncode == 7, result.stdout + result.stderr
    assert "micro_batch_size" in result.stderr
    assert "Traceback" not in result.stderr
    record = json.loads((run_folders(tmp_path)[0] / "run.json").read_text())
    assert (record["status"], record["exit_code"]) == ("failed", 7)


def features_of(command: Run, accelerator: str, folder: Path) -> Tensor:
    """Return image features [N, D] from the cache of `evaluate.py`."""
    output_dir = folder / accelerator
    result = command(
        "evaluate.py", "model=rn50", f"pretrained={folder}/rn50.safetensors", "task=retrieval",
        f"task.retrieval.table={folder}/pairs.csv", "num_workers=0", f"accelerator={accelerator}", f"output_dir={output_dir}",
        cwd=folder, cold=True, timeout_s=600,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    blocks = sorted(output_dir.glob("cache/features/*/block-*.safetensors"))
    return torch.cat([load_file(block)["features"] for block in blocks])


def test_features_of_a_resnet_in_float32_are_those_of_a_cpu(command: Run, tmp_path: Path) -> None:
    """With convolutions in TF32, the difference would be ten times as large."""
    torch.manual_seed(0)
    save_file(build_model(named_model("rn50")).state_dict(), tmp_path / "rn50.safetensors")
    with (tmp_path / "pairs.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["filepath", "title"])
        for number in range(16):
            rows.writerow([write_image(tmp_path / f"{number}.png", number, (240, 230)), f"image {number}"])
    on_cpu, on_gpu = features_of(command, "cpu", tmp_path), features_of(command, "gpu", tmp_path)
    assert on_cpu.shape == (16, 1024)
    assert on_cpu.norm(dim=1).tolist() == pytest.approx([1] * 16, abs=1e-5)
    assert (on_cpu - on_gpu).norm(dim=1).max() < 1e-4
