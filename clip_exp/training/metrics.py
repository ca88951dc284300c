"""What a run logs: a row per logged step in `metrics.csv`, and the callback that measures it for every logger."""

import csv
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities import rank_zero_only

from clip_exp.data.loader import cores_per_rank, count_workers
from clip_exp.errors import NumericError
from clip_exp.ranks.group import local_world_size
from clip_exp.runs import read_metrics
from clip_exp.storage import atomic_file, remove_leftovers
from clip_exp.training.callbacks import last_validation
from clip_exp.training.diagnosis import LoaderWatch, Loading
from clip_exp.training.timing import StepTimes, step_clock

log = logging.getLogger(__name__)

FIRST_COLUMNS = [
    "step",
    "samples_seen",
    "epoch",
    "train/loss",
    "lr",
    "grad_norm",
    "logit_scale",
    "samples_per_s",
    "data_wait_s",
    "compute_s",
]


class MetricsCSV(Logger):
    """Rows of `metrics.csv`, one per step; what is logged twice for a step shares its row.

    A continued run drops the rows after the step that it continues from. Rows that cannot be written, on a full disk for
    example, are written with a later one, or at the end.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.rows: dict[int, dict[str, Any]] = {}  # all of them, by step
        self.incomplete = False  # the file lacks rows that could not be written
        self.columns: dict[str, None] = {}  # in the order of their first appearance

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """`config.yaml` holds them."""

    @rank_zero_only
    def continue_from(self, step: int) -> None:
        """Keep the rows up to `step` of the file that is there."""
        remove_leftovers(self.path)
        if self.path.is_file():
            self.rows = {row["step"]: row for row in read_metrics(self.path) if row["step"] <= step}
            self.columns = dict.fromkeys(name for row in self.rows.values() for name in row)
            self._write(self._rewrite)

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        fresh = step not in self.rows
        row = self.rows.setdefault(step, {"step": step})
        row.update(metrics)
        if fresh and self.rows.keys() != {step} and row.keys() <= self.columns.keys() and not self.incomplete:
            self._write(partial(self._append, row))
        else:
            self.columns.update(dict.fromkeys(row))
            self._write(self._rewrite)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self.incomplete:
            self._write(self._rewrite)

    def _write(self, write: Callable[[], None]) -> None:
        """Write, or warn once that rows are kept in memory until the file can be written again."""
        try:
            write()
        except OSError as error:
            if not self.incomplete:
                log.warning("%s cannot be written: %s. Its rows are kept and written later.", self.path, error.strerror)
            self.incomplete = True
        else:
            self.incomplete = False

    def _append(self, row: dict[str, Any]) -> None:
        size = self.path.stat().st_size
        try:
            with self.path.open("a", newline="", encoding="utf-8") as handle:
                csv.DictWriter(handle, self._header()).writerow(row)
        except OSError:
            with suppress(OSError):  # half a row could pass for a whole one
                os.truncate(self.path, size)
            raise

    def _header(self) -> list[str]:
        return [name for name in FIRST_COLUMNS if name in self.columns] + [
            name for name in self.columns if name not in FIRST_COLUMNS
        ]

    def _rewrite(self) -> None:
        # Rows that are appended are not waited for either.
        with (
            atomic_file(self.path, durable=False) as temporary,
            temporary.open("w", newline="", encoding="utf-8") as handle,
        ):
            writer = csv.DictWriter(handle, self._header())
            writer.writeheader()
            writer.writerows(self.in_order())

    def in_order(self) -> list[dict[str, Any]]:
        """Return all rows, by step."""
        return [row for _, row in sorted(self.rows.items())]


class StepMetrics(pl.Callback):
    """Measures every step, and logs every `every_n_steps` of them and every validation.

    Args:
        every_n_steps: optimizer steps between rows.
        global_batch_size: pairs per step over all ranks.
        epoch_rows: rows of an epoch.
    """

    def __init__(self, every_n_steps: int, global_batch_size: int, epoch_rows: int) -> None:
        self.every_n_steps = every_n_steps
        self.global_batch_size = global_batch_size
        self.epoch_rows = epoch_rows
        self.latest: dict[str, float] = {}
        self._lr = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        data, device = trainer.datamodule, trainer.strategy.root_device  # type: ignore[attr-defined]
        self._clock = step_clock(device, data.data_wait_s)
        data.on_train_batch = lambda: self._clock.begin(data.data_wait_s)
        workers = count_workers(data.config.num_workers, local_world_size(), device.type)
        cores = cores_per_rank(local_world_size())
        self._watch = LoaderWatch(Loading(workers, cores, data.preprocessing.size, shares_cores=device.type == "cpu"))
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()  # a process may train several runs

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # The scale learns at the base rate, whatever the rates of the towers.
        groups = trainer.optimizers[0].param_groups
        self._lr = next((group["lr"] for group in groups if group.get("name") == "logit_scale"), groups[0]["lr"])

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._clock.end()
        step = trainer.global_step
        if step % self.every_n_steps == 0 or step in (1, pl_module.total_steps):
            means = self._means(trainer, pl_module)
            times = of_slowest_loader(self._clock.take(), trainer)
            self.latest = self._collect(trainer, means, times)
            log_metrics(trainer, self.latest, step)
            advice = self._watch.add(times)
            if advice is not None:
                log.info(advice)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        log_metrics(trainer, last_validation(trainer), trainer.global_step)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give the GPU's memory back: model and optimizer have left it by now."""
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.empty_cache()

    def pause(self) -> None:
        """Leave what follows out of the times, until training asks for its next batch. All ranks call."""
        self._clock.pause()

    def _means(self, trainer: pl.Trainer, pl_module: Any) -> dict[str, float]:
        """What the step measured, over all ranks."""
        names = [name for name in ("train/loss", "logit_scale", "grad_norm") if name in pl_module.step_metrics]
        own = torch.stack([pl_module.step_metrics[name].float().reshape(()) for name in names])
        means = dict(zip(names, trainer.strategy.reduce(own, reduce_op="mean").tolist(), strict=True))
        engine = getattr(trainer.strategy, "deepspeed_engine", None)
        if engine is not None:
            means["grad_norm"] = float(engine.get_global_grad_norm() or 0.0)
        _require_finite(means["train/loss"], trainer.global_step)
        return means

    def _collect(self, trainer: pl.Trainer, means: dict[str, float], times: StepTimes) -> dict[str, float]:
        seen = trainer.global_step * self.global_batch_size
        metrics = {
            "samples_seen": seen,
            "epoch": seen / self.epoch_rows,
            **means,
            "lr": self._lr,  # that the step was taken with
            "samples_per_s": self.global_batch_size * times.steps / times.wall_s,
            "data_wait_s": times.wait_s,
            "compute_s": times.compute_s,
        }
        if trainer.strategy.root_device.type == "cuda":
            metrics["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 2**30
        return metrics


def of_slowest_loader(times: StepTimes, trainer: pl.Trainer) -> StepTimes:
    """Return the times of the rank that waited longest for its data; all ranks call.

    The others wait for it in their collectives, which counts as computing there. Times of one rank belong together, and by the
    wall clock all ranks take equally long.
    """
    own = torch.tensor(
        [times.waited_s, times.computed_s, times.wall_s], device=trainer.strategy.root_device, dtype=torch.float64
    )
    return StepTimes(times.steps, *max(trainer.strategy.all_gather(own).reshape(-1, 3).tolist()))


def _require_finite(loss: float, step: int) -> None:
    if loss != loss or loss in (float("inf"), float("-inf")):
        raise NumericError(
            f"the loss became {loss} at step {step}. Lower optimizer.lr, lengthen scheduler.warmup_steps, or train in precision=32-true; "
            "the last checkpoint is from before."
        )


def log_metrics(trainer: pl.Trainer, metrics: dict[str, float], step: int) -> None:
    """To every logger of the run; only rank 0 has any."""
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=step)
