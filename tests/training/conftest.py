"""Runs that several tests look at, trained once per session."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from clip_exp.checkpoints.discovery import latest
from clip_exp.training.metrics import read_metrics

# vit_tiny on drawn scenes: small, but every part that a photograph's run has.
TINY = (
    "model=vit_tiny", "data=shapes", "data.generate.rows=96", "data.generate.val_rows=24", "global_batch_size=16",
    "data.num_workers=0", "precision=32-true", "trainer.accelerator=cpu", "optimizer.lr=1e-3", "resume=never",
)  # fmt: skip


@dataclass(frozen=True)
class Finished:
    """What a run left behind."""

    folder: Path
    output: str

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return read_metrics(self.folder / "metrics.csv")

    @property
    def losses(self) -> list[float]:
        return [row["train/loss"] for row in self.metrics if "train/loss" in row]

    @property
    def weights(self) -> dict[str, Tensor]:
        return load_file(latest(self.folder) / "model.safetensors")

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.folder / "summary.json").read_text())

    @property
    def record(self) -> dict[str, Any]:
        return json.loads((self.folder / "run.json").read_text())


Train = Callable[..., Finished]


def run_folders(output_dir: Path) -> list[Path]:
    return sorted(path.parent for path in output_dir.glob("train/*/*/run.json"))


@pytest.fixture(scope="session")
def train(command, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Train by the command line in an output folder of its own, which must end well."""

    def run(*overrides: str, output_dir: Path | None = None, **environment: str) -> Finished:
        output_dir = output_dir or tmp_path_factory.mktemp("outputs")
        result = command(
            "train.py", *overrides, f"output_dir={output_dir}", cwd=output_dir, timeout_s=600, **environment
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return Finished(run_folders(output_dir)[-1], result.stdout)

    return run


@pytest.fixture(scope="session")
def single(train: Train) -> Finished:
    """Twenty steps in one process, which every other way of running them must reproduce."""
    return train(*TINY, "max_steps=20", "log_every_n_steps=1", "checkpoint_every_n_steps=10", "val_every_n_steps=10")
