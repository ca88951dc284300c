"""What happens around the steps, in the order in which it happens: progress, the last step, averaged weights, checkpoints, stopping, failures.

Each of these is a callback of Lightning's; `fit` puts them together, with those that measure (`metrics`) and score (`tasks`).
"""

import copy
import logging
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import rich.progress
import torch
import torch.distributed as dist
from pytorch_lightning.callbacks import EarlyStopping
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn

from clip_exp.checkpoints.folders import MANIFEST, folder_of, manifests, step_of
from clip_exp.checkpoints.io import EMA_KEY, SafeCheckpointIO
from clip_exp.config.training import DeepSpeedConfig, StrategyName, TrainConfig
from clip_exp.data.loader import explain_worker_failure
from clip_exp.devices import is_out_of_memory
from clip_exp.errors import CheckpointError, ConfigError, DeviceMemoryError, DistributedError
from clip_exp.ranks import failure, group
from clip_exp.ranks.failure import StopRequest
from clip_exp.ranks.group import from_main
from clip_exp.storage import remove_folder
from clip_exp.training.messages import LOG_ONLY
from clip_exp.training.metrics import StepMetrics, last_validation, seconds
from clip_exp.training.preflight import is_of_task, monitor_mode

if TYPE_CHECKING:
    from clip_exp.training.tasks import TaskScores

log = logging.getLogger(__name__)

KEEP_LAST = 2
RETRY_PAUSE_S = 10.0  # between attempts to write the last checkpoint


# ---------------------------------------------------------------------------------------------- what the terminal shows


class Progress(pl.Callback):
    """A line for every logged step, every validation and every scoring of tasks, or one live line with a bar.

    `train.log` has all lines, whatever the terminal shows.

    Args:
        kind: `bar`, `lines`, `none`, or `auto`: a bar where standard output is a terminal.
        metrics: of the run.
    """

    def __init__(self, kind: str, metrics: StepMetrics) -> None:
        if kind == "auto":
            kind = "bar" if sys.stdout.isatty() else "lines"
        self.metrics = metrics
        self.with_bar = kind == "bar"
        self.steps = {} if kind == "lines" else LOG_ONLY
        self.values = LOG_ONLY if kind == "none" else {}
        self.bar: rich.progress.Progress | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self.with_bar and trainer.is_global_zero:
            description = TextColumn("{task.description}")
            self.bar = rich.progress.Progress(
                BarColumn(), MofNCompleteColumn(), description, TimeElapsedColumn(), TimeRemainingColumn()
            )
            self.bar.start()
            self.task = self.bar.add_task("", total=pl_module.total_steps, completed=trainer.global_step)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        latest, description = self.metrics.latest, ""
        step, total = trainer.global_step, pl_module.total_steps
        if latest:
            times = f"{seconds(latest['train/data_wait_s'])} waiting for data + {seconds(latest['train/compute_s'])} computing"
            description = f"loss {latest['train/loss']:.4f}  {latest['train/samples_per_s']:,.0f} samples/s  {times}"
        if latest.get("samples_seen") == step * self.metrics.global_batch_size:
            left_s = (total - step) * self.metrics.global_batch_size / latest["train/samples_per_s"]
            left = f"{int(left_s // 60)}:{int(left_s % 60):02d} left"
            log.info(f"step {step}/{total}  {description}  {left}", extra=self.steps)
        if self.bar is not None:
            self.bar.update(self.task, completed=step, description=description)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.show(last_validation(trainer))

    def scoring(self, tasks: list[str]) -> None:
        """Say what the bar is waiting for."""
        if self.bar is not None:
            self.bar.update(self.task, description=f"scoring {', '.join(tasks)}")

    def show(self, values: dict[str, float]) -> None:
        """Show results of validation or of tasks."""
        log.info("  ".join(f"{name} {value:.4f}" for name, value in values.items()), extra=self.values)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        self.on_train_end(trainer, pl_module)


# -------------------------------------------------------------------------------------------------------- the last step


class StopAtEnd(pl.Callback):
    """Lets the last step be validated, whatever the interval: Lightning validates before it stops.

    A run that had lost its `patience` when it was interrupted does not train on.
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        early = [callback for callback in trainer.callbacks if isinstance(callback, EarlyStopping)]  # type: ignore[attr-defined]
        lost = any(callback.wait_count >= callback.patience for callback in early)
        if lost or trainer.global_step >= pl_module.total_steps:
            trainer.should_stop = True

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step >= pl_module.total_steps:
            trainer.should_stop = True


# ----------------------------------------------------------------------------------------------------- averaged weights


@dataclass(eq=False, repr=False)
class AveragedWeights(pl.Callback):
    """An exponential moving average of the model's weights: `ema.safetensors` in every checkpoint."""

    decay: float  # share of the old average that a step keeps
    every_n_steps: int = 1  # optimizer steps between updates
    average: nn.Module | None = field(default=None, init=False)
    _loaded: dict[str, Any] | None = field(default=None, init=False)

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        model = pl_module.model
        self.average = copy.deepcopy(model).requires_grad_(False)
        if self._loaded is not None:
            self.average.load_state_dict(self._loaded)
            self._loaded = None
        # Listed once: what walks over the modules in every step keeps the GPU waiting for the process.
        self._parameters = list(self.average.parameters()), list(model.parameters())
        self._buffers = list(self.average.buffers()), list(model.buffers())

    @torch.no_grad()
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Update the average. Nothing here may wait for the GPU: that would cost every step its run ahead."""
        if trainer.global_step % self.every_n_steps == 0:
            torch._foreach_lerp_(*self._parameters, 1 - self.decay)
            if self._buffers[0]:
                torch._foreach_copy_(*self._buffers)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if self.average is not None and trainer.is_global_zero:  # which alone writes
            checkpoint[EMA_KEY] = {key: value.cpu() for key, value in self.average.state_dict().items()}

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self._loaded = checkpoint.get(EMA_KEY)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Let the average go, which would outlive the run on the GPU."""
        self.average = None
        self._parameters = self._buffers = [], []


# ---------------------------------------------------------------------------------------------------------- checkpoints


def validation_due(trainer: pl.Trainer, total_steps: int) -> bool:
    """Whether Lightning validates after the step that just ended."""
    if not trainer.enable_validation or trainer.val_check_batch is None:
        return False
    step = trainer.global_step
    return step % int(trainer.val_check_batch) == 0 or step == total_steps or trainer.should_stop


@dataclass(eq=False, repr=False)
class Checkpointer(pl.Callback):
    """Writes `checkpoints/step-<n>/` at ends of steps: every `every_n_steps`, at the end, and when `monitor` is best.

    A checkpoint of a step that is validated is written after the validation. The last two and the best stay. One that cannot
    be written is left out with a warning, but for the last one of a process, which is retried.
    """

    run_dir: Path
    io: SafeCheckpointIO  # the trainer's
    every_n_steps: int
    monitor: str | None  # name of a metric of validation or of a task
    mode: str  # whether `min` or `max` of `monitor` is best; `auto` goes by the metric (`reports.names`)
    metadata: dict[str, Any]  # noted in every manifest
    pause: Callable[[], None]  # called before anything at the end of a step that is not training
    scores: "TaskScores | None" = None  # of the run's tasks, if it has any
    retry_s: float = field(kw_only=True)  # seconds for which the last checkpoint is retried
    best: float | None = field(default=None, init=False)
    saved_step: int | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.mode = monitor_mode(self.monitor, self.mode)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if (folder_of(self.run_dir, trainer.global_step) / MANIFEST).is_file():
            self.saved_step = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if validation_due(trainer, pl_module.total_steps):
            self.pause()  # here, not in `on_validation_start`: before that Lightning starts the loader's workers
            return
        better = self._better(trainer) if self._scored_now(trainer) and is_of_task(self.monitor) else None
        if better is not None or trainer.global_step % self.every_n_steps == 0:
            self.save(trainer, best=better)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        better = self._better(trainer) if self._scored_now(trainer) or not is_of_task(self.monitor) else None
        last = trainer.global_step >= pl_module.total_steps
        if better is not None or trainer.global_step % self.every_n_steps == 0 or last:
            self.save(trainer, best=better, metrics=last_validation(trainer), last=last)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self.saved_step != trainer.global_step:
            self.save(trainer, last=True)

    def save(
        self,
        trainer: pl.Trainer,
        best: float | None = None,
        metrics: dict[str, float] | None = None,
        last: bool = False,
    ) -> None:
        """Write the checkpoint of the present step on all ranks; rank 0 then removes what is no longer needed.

        Args:
            best: value of `monitor`, if it is the best so far.
            metrics: of the validation of this step.
            last: of this process. If it cannot be written, that is retried for `retry_s`, and then a CheckpointError; any other is
                left to the next interval.
        """
        self.pause()
        before = self.best
        if best is not None:
            self.best = best  # which is in the checkpoint
        of_tasks = self.scores.values if self.scores is not None and self._scored_now(trainer) else {}
        self.io.metadata = {**self.metadata, "best": best is not None, "metrics": {**(metrics or {}), **of_tasks}}
        problem = self._write(trainer)
        if problem is not None and last:
            self._retry(trainer, problem)
        elif problem is not None:
            self.best = before
            log.warning("%s Training continues; the next checkpoint is tried when it is due.", problem)
            return
        self.saved_step = trainer.global_step
        # All ranks wait until it is done: in the next step they would, and it would count as computing.
        from_main(self._prune)

    def _write(self, trainer: pl.Trainer) -> str | None:
        """Write the checkpoint; return why it could not be written, on all ranks."""
        problem = None
        try:
            trainer.save_checkpoint(folder_of(self.run_dir, trainer.global_step))
        except CheckpointError as error:
            problem = str(error)
            # Only rank 0 writes; the others wait where `save_checkpoint` ends.
            trainer.strategy.barrier("Trainer.save_checkpoint")
        return from_main(lambda: problem)

    def _retry(self, trainer: pl.Trainer, problem: str | None) -> None:
        """Try again until the checkpoint is written; raise a CheckpointError when `retry_s` are over."""
        end_s = time.monotonic() + self.retry_s
        log.warning("%s Trying again for %g s (callbacks.save_retry_s).", problem, self.retry_s)
        while problem is not None:
            pause_s = from_main(lambda: min(RETRY_PAUSE_S, end_s - time.monotonic()))
            if pause_s <= 0:
                kept = from_main(lambda: ", ".join(path.name for path in manifests(self.run_dir)) or "no checkpoint")
                raise CheckpointError(
                    f"{problem} It was tried for {self.retry_s:g} s (callbacks.save_retry_s). Kept in {self.run_dir}: {kept}. "
                    "Make room and give the same command again."
                )
            time.sleep(pause_s)
            problem = self._write(trainer)

    def _scored_now(self, trainer: pl.Trainer) -> bool:
        return self.scores is not None and self.scores.scored_step == trainer.global_step

    def _better(self, trainer: pl.Trainer) -> float | None:
        """Return the value of `monitor` if no checkpoint has a better one."""
        if self.monitor is None:
            return None
        value = trainer.callback_metrics.get(self.monitor)
        if value is None:
            raise ConfigError(
                f"monitor={self.monitor} was not measured. There are: {', '.join(sorted(trainer.callback_metrics))}."
            )
        if not math.isfinite(value.item()):
            return None
        better = self.best is None or (value.item() < self.best if self.mode == "min" else value.item() > self.best)
        return value.item() if better else None

    def _prune(self) -> None:
        found = manifests(self.run_dir)
        marked = [path for path, manifest in found.items() if manifest.best]
        needed = {*list(found)[-KEEP_LAST:], *marked[-1:]}
        try:
            for path in found:
                if path not in needed and step_of(path) <= (self.saved_step or 0):
                    remove_folder(path)
        except OSError as error:
            log.warning("%s cannot be removed: %s. That is tried after the next save.", path, error.strerror or error)


class Preempted(Exception):
    """Raised at the end of a step whose checkpoint is written."""


@dataclass(eq=False, repr=False)
class Preemption(pl.Callback):
    """Saves and ends the run at the end of the step in which a signal came.

    Lightning's own handling lets each rank stop when its signal arrives, and ranks that stop at different steps wait for
    each other forever. Here the ranks agree at every step, through a CPU tensor, which does not wait for a GPU. A step that
    is to be validated is validated first, so that resuming misses nothing. A save that fails is retried; see `Checkpointer.save`.
    """

    request: StopRequest  # the signal, noted by `ranks.signals.note_signals`
    checkpointer: Checkpointer | None = field(default=None, init=False)
    _stopping: bool = field(default=False, init=False)

    def take_over(self, trainer: pl.Trainer, checkpointer: Checkpointer) -> None:
        """Act for `trainer`, in the place of Lightning's own signal handlers."""
        self.checkpointer = checkpointer
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        requested = self.request.received
        if group.world_size() > 1:
            flag = torch.tensor([requested], dtype=torch.int32)
            dist.all_reduce(flag, dist.ReduceOp.MAX)
            requested = bool(flag.item())
        self._stopping = requested and trainer.global_step < pl_module.total_steps
        if self._stopping and not validation_due(trainer, pl_module.total_steps):
            self._stop(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self._stopping:
            self._stop(trainer)

    def _stop(self, trainer: pl.Trainer) -> None:
        assert self.checkpointer is not None
        if self.checkpointer.saved_step != trainer.global_step:
            self.checkpointer.save(trainer, last=True)
        raise Preempted


# ------------------------------------------------------------------------------------------------------------- failures


class ReportFailure(pl.Callback):
    """Reports the failure of a rank as soon as Lightning sees it.

    What Lightning does next may block forever: it moves the model to the CPU, behind whatever the GPU waits for.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        if not isinstance(exception, Preempted):
            failure.report(explain(exception, trainer, self.config))


class SameRanks(pl.Callback):
    """Checks before the first step that the group, Lightning and DeepSpeed agree on rank, number of ranks and device."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        device = trainer.strategy.root_device
        ours = f"rank {group.rank()} of {group.world_size()} on {group.device(device.type)}"
        found = {"Lightning": f"rank {trainer.global_rank} of {trainer.world_size} on {device}"}
        engine = getattr(trainer.strategy, "deepspeed_engine", None)
        if engine is not None:
            found["DeepSpeed"] = f"rank {engine.global_rank} of {engine.world_size} on {engine.device}"
        for library, theirs in found.items():
            if theirs != ours:
                raise DistributedError(
                    f"{ours} is {theirs} for {library}: training would be wrong. Please report this with the environment variables "
                    "of your launcher."
                )


def explain(error: BaseException, trainer: pl.Trainer, config: TrainConfig) -> BaseException:
    """Return what to report of an error in training: one of ours where the cause is known, else the error."""
    worker_failure = explain_worker_failure(error, "data.num_workers")
    if worker_failure is not None:
        return worker_failure
    if not is_out_of_memory(error):
        return group.lost_touch(error) or error
    device, peak = trainer.strategy.root_device, ""
    if device.type == "cuda":
        peak = f" after a peak of {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB"
    per_rank = config.global_batch_size // group.world_size()
    micro = min(config.micro_batch_size or per_rank, per_rank)
    remedies = []
    if micro > 1:
        remedies.append(f"set micro_batch_size={max(1, micro // 2)} (now {micro}), which gives the same gradients")
    if config.strategy.name != StrategyName.deepspeed and group.world_size() > 1:
        remedies.append("split the optimizer's state over the ranks with strategy=deepspeed_stage_2 or 3")
    elif isinstance(config.strategy, DeepSpeedConfig) and not config.strategy.offload:
        remedies.append(
            "keep the optimizer's state in host memory with strategy=deepspeed_stage_2_offload or 3_offload"
        )
    remedies.append(f"lower global_batch_size={config.global_batch_size}")
    first = str(error).strip().splitlines() or [type(error).__name__]
    return DeviceMemoryError(
        f"out of memory on {device} in step {trainer.global_step + 1}, rank {group.rank()} of {group.world_size()}{peak}: "
        f"{'; or '.join(remedies)}.\n  {first[0]}"
    )
