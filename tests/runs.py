"""Runs in tests: the overrides of a small one, and what it left behind."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from clip_exp.checkpoints.folders import latest
from clip_exp.runs import RunRecord, read_metrics

# vit_nano on drawn scenes: small, but every part that a photograph's run has.
TINY = (
    "model=vit_nano", "data=shapes", "data.generate.rows=96", "data.generate.val_rows=24", "global_batch_size=16",
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


def unfinish(folder: Path) -> None:
    """Let a finished run look like one that was killed."""
    RunRecord(folder).update(status="running")


Train = Callable[..., Finished]


def run_folders(output_dir: Path) -> list[Path]:
    return sorted(path.parent for path in output_dir.glob("train/*/*/run.json"))
