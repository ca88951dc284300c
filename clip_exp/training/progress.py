"""Progress of training: a bar on a terminal, lines in a file; loss, samples per second and the time left."""

import sys
from typing import Any

import pytorch_lightning as pl
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from clip_exp.training.callbacks import last_validation
from clip_exp.training.diagnosis import seconds
from clip_exp.training.metrics import StepMetrics


def build_progress(kind: str, metrics: StepMetrics) -> "BarProgress | LineProgress | None":
    """`bar`, `lines`, `none`, or `auto`: a bar where standard output is a terminal."""
    if kind == "auto":
        kind = "bar" if sys.stdout.isatty() else "lines"
    if kind == "none":
        return None
    return BarProgress(metrics) if kind == "bar" else LineProgress(metrics)


def _describe(latest: dict[str, float]) -> str:
    if not latest:
        return ""
    times = f"{seconds(latest['data_wait_s'])} waiting for data + {seconds(latest['compute_s'])} computing"
    return f"loss {latest['train/loss']:.4f}  {latest['samples_per_s']:,.0f} samples/s  {times}"


def _listed(values: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in values.items())


class BarProgress(pl.Callback):
    """One live line with a bar."""

    def __init__(self, metrics: StepMetrics) -> None:
        self.metrics = metrics
        self.bar: Progress | None = None
        self.task: TaskID | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero:
            columns = (
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.description}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            self.bar = Progress(*columns)
            self.bar.start()
            self.task = self.bar.add_task("", total=pl_module.total_steps, completed=trainer.global_step)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=trainer.global_step, description=_describe(self.metrics.latest))

    def scoring(self, tasks: list[str]) -> None:
        """Say what the bar is waiting for."""
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, description=f"scoring {', '.join(tasks)}")

    def show(self, values: dict[str, float]) -> None:
        """A line above the bar."""
        if self.bar is not None:
            self.bar.console.print(_listed(values), soft_wrap=True, highlight=False)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


class LineProgress(pl.Callback):
    """A line for every logged step and every validation."""

    def __init__(self, metrics: StepMetrics) -> None:
        self.metrics = metrics
        self.console = Console(soft_wrap=True, highlight=False)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        latest = self.metrics.latest
        step, total = trainer.global_step, pl_module.total_steps
        if trainer.is_global_zero and latest.get("samples_seen") == step * self.metrics.global_batch_size:
            left_s = (total - step) * self.metrics.global_batch_size / latest["samples_per_s"]
            self.console.print(
                f"step {step}/{total}  {_describe(latest)}  {int(left_s // 60)}:{int(left_s % 60):02d} left"
            )

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero:
            self.show(last_validation(trainer))

    def scoring(self, tasks: list[str]) -> None:
        """Nothing: the next line will tell."""

    def show(self, values: dict[str, float]) -> None:
        self.console.print(_listed(values))
