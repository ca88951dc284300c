"""Metrics of a training run: step times, a row per logged step for every logger, and advice if the data loader is the bottleneck.

`StepMetrics` is the callback that collects them. A clock times the steps, and `LoaderWatch` gives advice if they wait for data. All
metrics go to `metrics.csv`, which is always written, and to the loggers in the configuration.
"""

import csv
import inspect
import json
import logging
import math
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial, wraps
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pytorch_lightning as pl
import torch
from lightning_utilities.core.imports import RequirementCache
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities import rank_zero_only

from clip_exp.config.base import plain
from clip_exp.config.targets import build_extra, locate
from clip_exp.config.training import LoggerConfig, TrainConfig, WandbConfig
from clip_exp.data.loader import cores_per_rank, count_workers
from clip_exp.errors import NumericError
from clip_exp.ranks.group import local_world_size
from clip_exp.runs import provenance, read_metrics
from clip_exp.secrets import redact
from clip_exp.storage import atomic_file, remove_leftovers
from clip_exp.training.opening import flatten
from clip_exp.training.skipped_steps import REMEDIES, SkippedSteps

log = logging.getLogger(__name__)

FIRST_COLUMNS = [
    "step", "samples_seen", "epoch", "train/loss", "train/lr", "train/grad_norm", "train/logit_scale", "train/samples_per_s",
    "train/data_wait_s", "train/compute_s",
]  # fmt: skip

MAX_WAIT_FRACTION = 0.2  # fraction of the time that may be spent waiting for data without advice
WARMUP_STEPS = 10  # ignored: workers start, and the batches that they prefetch are used up
WINDOW_STEPS = 20  # several batches per worker, since workers deliver in bursts
WINDOW_S = 2.0  # a shorter window could be dominated by a short stall of the machine


# --------------------------------------------------------------------------------------------------- the times of steps


@dataclass(frozen=True)
class StepTimes:
    """Total times of several steps, in seconds; `wait_s`, `compute_s` and `step_s` are means per step."""

    steps: int = 0
    waited_s: float = 0.0  # idle, because the next batch was not ready
    computed_s: float = 0.0  # copying the batch to the device, forward, backward and optimizer step
    # Wall time. It also includes the rest: averaging of weights, logging, agreement of the ranks, and a GPU that idles because
    # the process is too slow to launch its kernels.
    wall_s: float = 0.0

    @property
    def wait_s(self) -> float:
        return self.waited_s / max(self.steps, 1)

    @property
    def compute_s(self) -> float:
        return self.computed_s / max(self.steps, 1)

    @property
    def step_s(self) -> float:
        return self.wall_s / max(self.steps, 1)

    @property
    def wait_fraction(self) -> float:
        """Fraction of the wall time that was spent waiting for data."""
        return self.waited_s / self.wall_s if self.wall_s else 0.0

    def __add__(self, other: "StepTimes") -> "StepTimes":
        return StepTimes(
            self.steps + other.steps,
            self.waited_s + other.waited_s,
            self.computed_s + other.computed_s,
            self.wall_s + other.wall_s,
        )


class StepClock:
    """Clock for this rank's steps. Wall time counts from the first batch, except between `pause` and the next batch.

    Args:
        waited_s: seconds that the process spent waiting for batches before the first measured step.
        now: function that returns the time in seconds.
    """

    def __init__(self, waited_s: float = 0.0, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._waited_s = waited_s
        self._began_s = 0.0
        self._counted_to_s: float | None = None  # time up to which wall time has been counted; None: paused
        self._times = StepTimes()

    def begin(self, waited_s: float) -> None:
        """Begin a step whose batch is ready but not yet on the device; `waited_s` is the total time spent waiting for batches."""
        since_last_s, self._waited_s = waited_s - self._waited_s, waited_s
        if self._counted_to_s is None:
            self._counted_to_s = self._now() - since_last_s
        self._begin(since_last_s)

    def end(self) -> None:
        """End the step: it has been computed, or, on a GPU, its kernels have been launched."""
        self._times += StepTimes(1, computed_s=self._now() - self._began_s)

    def pause(self) -> None:
        """Stop counting until training requests its next batch: validation, saving and scoring of tasks are not timed."""
        self._count_wall_time()
        self._counted_to_s = None

    def take(self) -> StepTimes:
        """Return the times of the steps since the last call."""
        self._count_wall_time()
        times, self._times = self._times, StepTimes()
        return times

    def _begin(self, waited_s: float) -> None:
        self._times += StepTimes(waited_s=waited_s)
        self._began_s = self._now()

    def _count_wall_time(self) -> None:
        if self._counted_to_s is not None:
            now_s = self._now()
            self._times += StepTimes(wall_s=now_s - self._counted_to_s)
            self._counted_to_s = now_s


class _StepEvents(NamedTuple):
    begin: Any  # GPU event before the step
    end: Any  # GPU event after the step
    waited_s: float  # time that the process waited for the batch of the step


class GPUClock(StepClock):
    """Clock for steps on a GPU, which runs asynchronously: it may still compute a step while the process waits for the next batch.

    Events on the GPU mark the begin and the end of each step, without synchronization. Computing is the time between the two. Waiting is
    the time that the GPU was idle between two steps, at most as long as the process waited for data. Times of the process alone would
    be wrong: it may wait for data while the GPU is busy, and its computing time is only that of launching kernels. Wall time is read
    after synchronizing with the GPU, in `take` and `pause`.

    Args:
        waited_s, now: see `StepClock`.
        event: function that creates an event on the GPU.
    """

    def __init__(
        self,
        waited_s: float = 0.0,
        now: Callable[[], float] = time.perf_counter,
        event: Callable[[], Any] = lambda: torch.cuda.Event(enable_timing=True),
    ) -> None:
        super().__init__(waited_s, now)
        self._event = event
        self._pending: deque[_StepEvents] = deque()
        self._last_end: Any = None

    def end(self) -> None:
        """End the step: record an event after it, and add the times of all steps that the GPU has completed."""
        self._pending[-1].end.record()
        while self._pending and self._pending[0].end.query():
            self._count(self._pending.popleft())

    def _begin(self, waited_s: float) -> None:
        self._pending.append(_StepEvents(self._event(), self._event(), waited_s))
        self._pending[-1].begin.record()

    def _count_wall_time(self) -> None:
        last = self._event()
        last.record()
        last.synchronize()
        while self._pending:
            self._count(self._pending.popleft())
        super()._count_wall_time()

    def _count(self, events: _StepEvents) -> None:
        idle_s = events.waited_s if self._last_end is None else self._last_end.elapsed_time(events.begin) / 1000
        self._times += StepTimes(1, min(idle_s, events.waited_s), events.begin.elapsed_time(events.end) / 1000)
        self._last_end = events.end


def step_clock(device: torch.device, waited_s: float) -> StepClock:
    """Return the step clock for a device."""
    return GPUClock(waited_s) if device.type == "cuda" else StepClock(waited_s)


# -------------------------------------------------------------------------------------- advice about the data loader


@dataclass(frozen=True)
class Loading:
    """Resources with which a rank loads its batches."""

    workers: int  # worker processes; 0: batches are loaded in the training process
    cores: int  # CPU cores available to this rank
    image_size: int  # side of the training images in pixels
    shares_cores: bool = False  # whether training also computes on these cores


class LoaderWatch:
    """Watch over step times that gives advice once if steps wait too long for data. The first steps do not count."""

    def __init__(self, loading: Loading) -> None:
        self.loading = loading
        self._steps = 0
        self._window: StepTimes | None = StepTimes()

    def add(self, times: StepTimes) -> str | None:
        """Add step times; return advice for the user, or None if there is none or it was already given."""
        warm = self._steps >= max(WARMUP_STEPS, 4 * self.loading.workers)
        self._steps += times.steps
        if self._window is None or not warm:
            return None
        window = self._window + times
        enough = window.steps >= max(WINDOW_STEPS, 5 * self.loading.workers) and window.wall_s >= WINDOW_S
        slow = enough and window.wait_fraction > MAX_WAIT_FRACTION
        self._window = None if slow else StepTimes() if enough else window
        return advice(window, self.loading) if slow else None


def workers_needed(times: StepTimes, workers: int) -> int:
    """Return the number of worker processes that would keep up with training.

    If training waits, all workers are busy all the time, so one worker needs the time of `workers` steps per batch. Without workers, a
    batch takes as long as training waits for it.
    """
    batch_s = times.step_s * workers if workers else times.wait_s
    return max(workers + 1, math.ceil(batch_s / max(times.step_s - times.wait_s, 1e-9)))


def advice(times: StepTimes, loading: Loading) -> str:
    """Return the advice: how much time is lost, and what to change."""
    needed = workers_needed(times, loading.workers)
    most = max(1, loading.cores - 1)  # one core per worker, and one for training
    lost = (
        f"The data loader is the bottleneck: in the last {times.steps} steps training waited for data {100 * times.wait_fraction:.0f} % of the time, "
        f"{seconds(times.wait_s)} of {seconds(times.step_s)} per step."
    )
    cores = f"are {loading.cores} cores" if loading.cores > 1 else "is 1 core"
    now = f"data.num_workers is {loading.workers}, and there {cores} per rank"
    side = round(loading.image_size * 256 / 224)
    smaller = f"resize the images once, to a shorter side of about {side} pixels"
    if needed <= most:
        shared = ", if training on the CPU leaves enough cores for them" if loading.shares_cores else ""
        return f"{lost} {now}: data.num_workers={needed} would keep up{shared}."
    if loading.workers < most:
        return (
            f"{lost} {now}: set data.num_workers={most}. About {needed} workers would be needed to keep up: "
            f"{smaller}, or train with more cores."
        )
    return f"{lost} {now}, which are all in use: {smaller}, or train with more cores."


def data_wait_fraction(rows: list[dict[str, Any]]) -> float | None:
    """Return the fraction of a run's wall time that was spent waiting for data, computed from the rows of `metrics.csv`.

    A row contains means over the steps since the previous row. The first row, which includes the start of the workers, is left out.
    """
    timed = [row for row in rows if "train/data_wait_s" in row and "train/samples_per_s" in row]
    times = StepTimes()
    for before, row in pairwise(timed):
        steps, samples = row["step"] - before["step"], row["samples_seen"] - before["samples_seen"]
        times += StepTimes(
            steps, waited_s=steps * row["train/data_wait_s"], wall_s=samples / row["train/samples_per_s"]
        )
    return times.wait_fraction if times.steps else None


def seconds(value: float) -> str:
    """Format a duration: `12 ms`, `1.24 s`."""
    return f"{1000 * value:.{0 if value >= 0.00995 else 1}f} ms" if value < 1 else f"{value:.2f} s"


# ---------------------------------------------------------------------------------------------------- metrics per step


@dataclass(eq=False, repr=False)
class StepMetrics(pl.Callback):
    """Callback that times every step, and logs metrics every `every_n_steps` steps and after every validation."""

    every_n_steps: int  # optimizer steps between logged rows
    global_batch_size: int  # pairs per step over all ranks
    epoch_rows: int  # rows of the training data, the length of an epoch
    skipped: SkippedSteps  # acts before this callback
    latest: dict[str, float] = field(default_factory=dict, init=False)
    _lr: float = field(default=0.0, init=False)

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
        # The logit scale always has the base rate, without factors per tower or layer.
        groups = trainer.optimizers[0].param_groups
        self._lr = next((group["lr"] for group in groups if group.get("name") == "logit_scale"), groups[0]["lr"])

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._clock.end()
        step = trainer.global_step
        if step % self.every_n_steps and step not in (1, pl_module.total_steps):
            return
        names = [
            name for name in ("train/loss", "train/logit_scale", "train/grad_norm") if name in pl_module.step_metrics
        ]
        own = torch.stack([pl_module.step_metrics[name].float().reshape(()) for name in names])
        means = dict(zip(names, trainer.strategy.reduce(own, reduce_op="mean").tolist(), strict=True))
        engine = getattr(trainer.strategy, "deepspeed_engine", None)
        if engine is not None:
            means["train/grad_norm"] = float(engine.get_global_grad_norm() or 0.0)
        self.skipped.read(trainer)
        if not math.isfinite(loss := means["train/loss"]) and not self.skipped.in_a_row:
            raise NumericError(
                f"the loss is {loss} at step {step}, although its gradient is finite. {REMEDIES}. The last checkpoint is not affected."
            )
        times = of_slowest_loader(self._clock.take(), trainer)
        seen = step * self.global_batch_size
        self.latest = {
            "samples_seen": seen,
            "epoch": seen / self.epoch_rows,
            **{name: mean for name, mean in means.items() if math.isfinite(mean)},  # not of a skipped step
            "train/lr": self._lr,  # the rate of this step; the scheduler has already set the next one
            "train/samples_per_s": self.global_batch_size * times.steps / times.wall_s,
            "train/data_wait_s": times.wait_s,
            "train/compute_s": times.compute_s,
        }
        if self.skipped.total:
            self.latest["train/skipped_steps"] = self.skipped.total
        if trainer.strategy.root_device.type == "cuda":
            self.latest["train/peak_memory_gb"] = torch.cuda.max_memory_allocated() / 2**30
        log_metrics(trainer, self.latest, step)
        if (advice := self._watch.add(times)) is not None:
            log.info(advice)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            log_metrics(trainer, last_validation(trainer), trainer.global_step)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Release cached GPU memory; model and optimizer have already been moved off the GPU."""
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.empty_cache()

    def pause(self) -> None:
        """Stop timing until training requests its next batch. All ranks must call this."""
        self._clock.pause()


def of_slowest_loader(times: StepTimes, trainer: pl.Trainer) -> StepTimes:
    """Return the times of the rank that waited longest for its data. All ranks must call this.

    The other ranks wait for it in their collectives, which counts as computing there, so means over the ranks would be misleading.
    Wall times are equal on all ranks.
    """
    values = [times.waited_s, times.computed_s, times.wall_s]
    own = torch.tensor(values, device=trainer.strategy.root_device, dtype=torch.float64)
    return StepTimes(times.steps, *max(trainer.strategy.all_gather(own).reshape(-1, 3).tolist()))


def last_validation(trainer: pl.Trainer) -> dict[str, float]:
    """Return the metrics of the last validation."""
    return {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("val/")}


def log_metrics(trainer: pl.Trainer, metrics: dict[str, float], step: int) -> None:
    """Log metrics to every logger of the run; only rank 0 has loggers."""
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=step)


# -------------------------------------------------------------------------------------------------------------- loggers


class MetricsCSV(Logger):
    """Logger that writes `metrics.csv`, with one row per step; metrics that are logged later for the same step go to the same row.

    A resumed run drops the rows after the step that it resumes from. Rows that cannot be written, for example on a full disk, are
    written with a later row or at the end.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.rows: dict[int, dict[str, Any]] = {}  # all rows, by step
        self.incomplete = False  # the file lacks rows that could not be written
        self.columns: dict[str, None] = {}  # an ordered set: columns in the order of their first appearance

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: `config.yaml` contains the hyperparameters."""

    @rank_zero_only
    def continue_from(self, step: int) -> int:
        """Read the existing file, and drop the rows after `step`; return the last step that it had, 0 if there was none."""
        remove_leftovers(self.path)
        if not self.path.is_file():
            if step:
                log.warning("%s is missing: the metrics of the steps up to %s are lost.", self.path, f"{step:,}")
                self._write(self._rewrite)  # the report reads it, even if no step is left to train
            return 0
        found = read_metrics(self.path)
        self.rows = {row["step"]: row for row in found if row["step"] <= step}
        self.columns = dict.fromkeys(name for row in self.rows.values() for name in row)
        self._write(self._rewrite)
        return max((row["step"] for row in found), default=0)

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
                log.warning(
                    "%s cannot be written: %s. Its rows are kept in memory and written later.",
                    self.path,
                    error.strerror,
                )
            self.incomplete = True
        else:
            self.incomplete = False

    def _append(self, row: dict[str, Any]) -> None:
        size = self.path.stat().st_size
        try:
            with self.path.open("a", newline="", encoding="utf-8") as handle:
                csv.DictWriter(handle, self._header()).writerow(row)
        except OSError:
            with suppress(OSError):  # an incomplete row could be read as a complete one
                os.truncate(self.path, size)
            raise

    def _header(self) -> list[str]:
        first = [name for name in FIRST_COLUMNS if name in self.columns]
        return [*first, *(name for name in self.columns if name not in FIRST_COLUMNS)]

    def _rewrite(self) -> None:
        # Not durable, like appended rows: waiting for the disk would slow down training.
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


def build_loggers(config: LoggerConfig, run_dir: Path, name: str) -> list[Logger]:
    """Build the run's loggers, `metrics.csv` first. If the Weights & Biases server does not respond, the run logs offline.

    Raises:
        ConfigError: an `extra` logger is not allowed, or rejects its arguments.
    """
    loggers: list[Logger] = [MetricsCSV(run_dir / "metrics.csv")]
    if config.tensorboard:
        loggers.append(TensorBoardLogger(run_dir, name="", version="tensorboard"))
    if config.wandb is not None and config.wandb.mode != "disabled":
        loggers.append(_wandb(config.wandb, run_dir, name))
    loggers += build_extra(config.extra, "logger.extra")
    return loggers


def logger_problems(config: LoggerConfig) -> Iterator[str]:
    """Yield an error message for every additional logger that is not one, or whose package is not installed.

    None is created, since that may open a connection.
    """
    for name, node in config.extra.items():
        found = locate(node.target, where := f"logger.extra.{name}")
        if inspect.isclass(found) and (missing := missing_package(found)) is not None:
            yield f"{where}: {found.__name__} needs a package that is not installed: pip install '{missing}'."
        elif inspect.isclass(found) and not issubclass(found, Logger):
            yield f"{where}: {found.__name__} is not a logger: give a subclass of pytorch_lightning.loggers.Logger as _target_."


def missing_package(logger: type) -> str | None:
    """Return the requirement of a logger's package if it is not installed: Lightning's loggers check it when they are created."""
    function: Any = inspect.unwrap(logger.__init__)  # type: ignore[misc]
    if not inspect.isfunction(function):
        return None
    checked = (function.__globals__.get(name) for name in function.__code__.co_names)
    return next((each.requirement for each in checked if isinstance(each, RequirementCache) and not each), None)


def start_loggers(loggers: list[Logger], config: TrainConfig) -> list[Logger]:
    """Pass the configuration and the git state of a run, without secrets, to the loggers; return the loggers that work.

    A logger other than `metrics.csv` that fails, now or later, is reported once, and the run continues without it.
    """
    csv, *others = loggers
    if not others:
        return [csv]
    about = provenance()
    values = _without_secrets({**plain(config), "clip_exp": about["clip_exp"], "git": about["git"]})
    return [csv, *(_expendable(logger) for logger in others if _starts(logger, values))]


def _starts(logger: Logger, values: dict[str, Any]) -> bool:
    """Pass the configuration to a logger, which makes it open its files or connection; return False if that failed."""
    try:
        if isinstance(logger, TensorBoardLogger):
            # TensorBoard shows a table with a column per key, and drops values that are neither numbers nor text.
            flat = flatten(values).items()
            values = {key: value if isinstance(value, str | int | float) else json.dumps(value) for key, value in flat}
        logger.log_hyperparams(values)
    except Exception as error:
        _leave_out(logger, logger.finalize, error)
        return False
    return True


def _expendable(logger: Logger) -> Logger:
    """Wrap the methods of a logger so that a failure disables the logger instead of ending the run."""
    failed = False
    finalize = logger.finalize

    def guard(method: Callable[..., None]) -> Callable[..., None]:
        @wraps(method)
        def guarded(*arguments: Any, **named: Any) -> None:
            nonlocal failed
            if failed:
                return
            try:
                method(*arguments, **named)
            except Exception as error:
                failed = True
                _leave_out(logger, finalize, error)

        return guarded

    # The methods that are called by the run and by Lightning.
    for name in ("log_metrics", "log_hyperparams", "log_graph", "save", "finalize"):
        setattr(logger, name, guard(getattr(logger, name)))
    return logger


def _leave_out(logger: Logger, finalize: Callable[[str], None], error: Exception) -> None:
    """Report the failure of a logger, and close it, so that its threads stop writing."""
    with suppress(Exception):
        finalize("failed")
    cause = error.__cause__ or error  # Lightning reports every failure of TensorBoard as a value that cannot be logged
    name = type(logger).__name__
    log.warning("%s failed: %s. Training continues without it; metrics.csv has all metrics.", name, cause)


def _without_secrets(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_secrets(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_secrets(item) for item in value]
    return redact(value) if isinstance(value, str) else value


def _wandb(config: WandbConfig, run_dir: Path, name: str) -> Logger:
    """Build the Weights & Biases logger, with files in the run folder and one id per folder, so that a resumed run keeps its chart."""
    import wandb
    from pytorch_lightning.loggers import WandbLogger

    offline = config.mode == "offline"
    if not offline and not _reachable(config.init_timeout_s):
        offline, later = True, run_dir / "wandb" / "latest-run"
        log.warning(
            "The Weights & Biases server does not respond: logging offline. Upload later with: wandb sync %s", later
        )
    run_id = f"{name}-{run_dir.name}"
    return WandbLogger(
        name=run_id,
        id=run_id,
        save_dir=run_dir,
        project=config.project,
        offline=offline,
        resume="allow",
        entity=config.entity,
        group=config.group,
        tags=config.tags,
        settings=wandb.Settings(
            mode="offline" if offline else "online",
            init_timeout=config.init_timeout_s,
            console="off",
            save_code=False,
            disable_git=True,
        ),
    )


def _reachable(timeout_s: float) -> bool:
    """Return True if the configured server accepts connections and there is an API key for it."""
    import wandb

    try:
        settings = wandb.setup().settings
        address = urlsplit(settings.base_url)
        port = address.port or (443 if address.scheme == "https" else 80)
        with socket.create_connection((address.hostname or "", port), timeout=timeout_s):
            return bool(settings.api_key or wandb.api.api_key)
    except Exception:
        return False
