"""Progress of training: loss, samples per second and the time left, as lines in `train.log` and as a bar or lines on the terminal."""

import logging
import sys
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import rich.progress
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from clip_exp.training.callbacks import last_validation
from clip_exp.training.diagnosis import seconds
from clip_exp.training.messages import LOG_ONLY
from clip_exp.training.metrics import StepMetrics

log = logging.getLogger(__name__)
SHOWN: Mapping[str, Any] = {}  # by the terminal as well as in `train.log`


def build_progress(kind: str, metrics: StepMetrics) -> "Progress":
    """`bar`, `lines`, `none`, or `auto`: a bar where standard output is a terminal. `train.log` has the lines of all of them."""
    if kind == "auto":
        kind = "bar" if sys.stdout.isatty() else "lines"
    if kind == "bar":
        return BarProgress(metrics, steps=LOG_ONLY, values=SHOWN)
    where = LOG_ONLY if kind == "none" else SHOWN
    return Progress(metrics, steps=where, values=where)


class Progress(pl.Callback):
    """A line for every logged step, every validation and every scoring of tasks.

    Args:
        metrics: of the run.
        steps: where the lines of steps are shown, `SHOWN` or `LOG_ONLY`.
        values: where the results of validation and tasks are.
    """

    def __init__(self, metrics: StepMetrics, *, steps: Mapping[str, Any], values: Mapping[str, Any]) -> None:
        self.metrics = metrics
        self.steps = steps
        self.values = values

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        latest = self.metrics.latest
        step, total = trainer.global_step, pl_module.total_steps
        if latest.get("samples_seen") == step * self.metrics.global_batch_size:
            left_s = (total - step) * self.metrics.global_batch_size / latest["samples_per_s"]
            line = f"step {step}/{total}  {_describe(latest)}  {int(left_s // 60)}:{int(left_s % 60):02d} left"
            log.info(line, extra=self.steps)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.show(last_validation(trainer))

    def scoring(self, tasks: list[str]) -> None:
        """Say what training waits for: nothing, the next line will."""

    def show(self, values: dict[str, float]) -> None:
        """Show results of validation or of tasks."""
        log.info("  ".join(f"{name} {value:.4f}" for name, value in values.items()), extra=self.values)


class BarProgress(Progress):
    """One live line with a bar on the terminal."""

    bar: rich.progress.Progress | None = None
    task: TaskID | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero:
            columns = (
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.description}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            self.bar = rich.progress.Progress(*columns)
            self.bar.start()
            self.task = self.bar.add_task("", total=pl_module.total_steps, completed=trainer.global_step)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=trainer.global_step, description=_describe(self.metrics.latest))

    def scoring(self, tasks: list[str]) -> None:
        """Say what the bar is waiting for."""
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, description=f"scoring {', '.join(tasks)}")

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def _describe(latest: dict[str, float]) -> str:
    if not latest:
        return ""
    times = f"{seconds(latest['data_wait_s'])} waiting for data + {seconds(latest['compute_s'])} computing"
    return f"loss {latest['train/loss']:.4f}  {latest['samples_per_s']:,.0f} samples/s  {times}"
