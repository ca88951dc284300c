"""Saving of a run, and its end after a signal: the callbacks that write checkpoints and that stop the ranks together.

`Checkpointer` decides when to save, which checkpoints stay, and what happens if one cannot be written. `checkpoints.io` writes them.
"""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytorch_lightning as pl
import torch
import torch.distributed as dist

from clip_exp.checkpoints.folders import MANIFEST, folder_of, manifests, step_of
from clip_exp.checkpoints.io import SafeCheckpointIO
from clip_exp.errors import CheckpointError, ClipExpError, ConfigError
from clip_exp.ranks import group
from clip_exp.ranks.failure import StopRequest
from clip_exp.ranks.group import from_main
from clip_exp.storage import remove_folder
from clip_exp.training.metrics import last_validation
from clip_exp.training.preflight import is_of_task, monitor_mode
from clip_exp.training.skipped_steps import SkippedSteps

if TYPE_CHECKING:
    from clip_exp.training.tasks import TaskScores

log = logging.getLogger(__name__)

RETRY_PAUSE_S = 10.0  # between attempts to write the last checkpoint


def validation_due(trainer: pl.Trainer, total_steps: int) -> bool:
    """Return True if Lightning will validate after the step that just ended."""
    if not trainer.enable_validation or trainer.val_check_batch is None:
        return False
    step = trainer.global_step
    return step % int(trainer.val_check_batch) == 0 or step == total_steps or trainer.should_stop


class _Save(NamedTuple):
    """Save that has begun."""

    step: int
    best_before: float | None  # value of `Checkpointer.best` if the save fails


@dataclass(eq=False, repr=False)
class Checkpointer(pl.Callback):
    """Callback that writes `checkpoints/step-<n>/` every `every_n_steps`, at the end of the run, and when `monitor` is best.

    If a step is validated, its checkpoint is written after the validation. The last `keep_last` checkpoints, the best one and those of
    every `keep_every_n_steps` steps are kept. A checkpoint that cannot be written is skipped with a warning; only the last one of a
    process is retried.

    The plugin may write a checkpoint while training continues. Its outcome is then looked at before the next save, before `best` is
    compared, and at the end.
    """

    run_dir: Path
    io: SafeCheckpointIO  # checkpoint plugin of the trainer
    every_n_steps: int
    monitor: str | None  # name of a metric of validation or of a task
    mode: str  # `min` or `max`: which values of `monitor` are best; `auto`: depends on the metric (`reports.names`)
    metadata: dict[str, Any]  # written to every manifest
    pause: Callable[[], None]  # called before work that must not count as training time
    skipped: SkippedSteps  # read before every save
    scores: "TaskScores | None" = None  # scores of the run's tasks; None: the run has no tasks
    retry_s: float = field(kw_only=True)  # seconds for which writing the last checkpoint is retried
    keep_last: int | None = field(default=2, kw_only=True)  # number of last checkpoints to keep; None: all
    keep_every_n_steps: int | None = field(default=None, kw_only=True)
    best: float | None = field(default=None, init=False)
    saved_step: int | None = field(default=None, init=False)  # of the last save that has succeeded
    _saving: _Save | None = field(default=None, init=False)  # save that is being written while training continues

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
            # Not in `on_validation_start`: Lightning starts the workers of the loader before that.
            self.pause()
            return
        better = self._better(trainer) if self._scored_now(trainer) and is_of_task(self.monitor) else None
        if better is not None or self._due(trainer.global_step):
            self.save(trainer, best=better)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.sanity_checking:
            return
        better = self._better(trainer) if self._scored_now(trainer) or not is_of_task(self.monitor) else None
        last = trainer.global_step >= pl_module.total_steps
        if better is not None or self._due(trainer.global_step) or last:
            self.save(trainer, best=better, metrics=last_validation(trainer), last=last)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.save_last(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        try:
            self.io.wait()
        except Exception as error:  # the run has failed already
            log.warning("The checkpoint in progress is not written: %s", error)

    def _due(self, step: int) -> bool:
        return step % self.every_n_steps == 0 or self._stays(step)

    def _stays(self, step: int) -> bool:
        """Return True if the checkpoint of a step is never removed."""
        return self.keep_every_n_steps is not None and step % self.keep_every_n_steps == 0

    def save(
        self,
        trainer: pl.Trainer,
        best: float | None = None,
        metrics: dict[str, float] | None = None,
        last: bool = False,
    ) -> None:
        """Write the checkpoint of the current step on all ranks.

        Args:
            trainer: trainer of this rank.
            best: value of `monitor` if it is the best so far.
            metrics: metrics of this step's validation.
            last: whether it is the last checkpoint of this process. If it cannot be written, writing is retried for `retry_s` seconds.
                Any other checkpoint is skipped.

        Raises:
            CheckpointError: the last checkpoint could not be written.
            NumericError: too many steps were skipped, or weights are not finite.
        """
        self.pause()
        self.settle()
        self.skipped.read(trainer)
        save = _Save(trainer.global_step, self.best)
        if best is not None:
            self.best = best  # before writing: the checkpoint contains this value
        of_tasks = self.scores.values if self.scores is not None and self._scored_now(trainer) else {}
        self.io.metadata = {**self.metadata, "best": best is not None, "metrics": {**(metrics or {}), **of_tasks}}
        problem, continues = self._begin(trainer)
        if continues and not last:
            self._saving = save
            return
        problem = self._outcome() if continues else problem
        if problem is not None and last:
            self._retry(trainer, problem)
            problem = None
        self._conclude(save, problem)

    def save_last(self, trainer: pl.Trainer) -> None:
        """Write the checkpoint of the current step before the process ends, unless it is already written."""
        self.settle()
        if self.saved_step != trainer.global_step:
            self.save(trainer, last=True)

    def settle(self) -> None:
        """Wait for the save that is being written, and look at its outcome. All ranks must call this."""
        if self._saving is not None:
            save, self._saving = self._saving, None
            self._conclude(save, self._outcome())

    def prune(self, step: int) -> None:
        """Remove checkpoints that are no longer needed after the one of `step` was written."""
        if self.keep_last is None:
            return
        found = manifests(self.run_dir)
        marked = [path for path, manifest in found.items() if manifest.best]
        needed = {
            *list(found)[-self.keep_last :],
            *marked[-1:],
            *(path for path in found if self._stays(step_of(path))),
        }
        try:
            for path in found:
                if path not in needed and step_of(path) <= step:
                    remove_folder(path)
        except OSError as error:
            log.warning("%s cannot be removed: %s. Retrying after the next save.", path, error.strerror or error)

    def _begin(self, trainer: pl.Trainer) -> tuple[str | None, bool]:
        """Begin a save; return on all ranks why it failed, or None, and whether it continues in the background."""
        error: ClipExpError | None = None
        try:
            trainer.save_checkpoint(folder_of(self.run_dir, trainer.global_step))
        except ClipExpError as raised:
            error = raised
            # Only rank 0 writes; the others wait where `save_checkpoint` ends.
            trainer.strategy.barrier("Trainer.save_checkpoint")
        return from_main(lambda: (_problem(error), self.io.is_saving))

    def _outcome(self) -> str | None:
        """Wait for the save in the background; return on all ranks why it failed, or None."""

        def wait() -> str | None:
            try:
                self.io.wait()
            except CheckpointError as error:
                return _problem(error)
            return None

        return from_main(wait)

    def _conclude(self, save: _Save, problem: str | None) -> None:
        if problem is None:
            self.saved_step = save.step
        else:
            self.best = save.best_before
            log.warning("%s Training continues without this checkpoint.", problem)

    def _retry(self, trainer: pl.Trainer, problem: str | None) -> None:
        """Retry until the checkpoint is written; raise a CheckpointError after `retry_s` seconds."""
        end_s = time.monotonic() + self.retry_s
        log.warning("%s Retrying for %g s (callbacks.save_retry_s).", problem, self.retry_s)
        while problem is not None:
            pause_s = from_main(lambda: min(RETRY_PAUSE_S, end_s - time.monotonic()))
            if pause_s <= 0:
                kept = from_main(lambda: ", ".join(path.name for path in manifests(self.run_dir)) or "none")
                raise CheckpointError(
                    f"{problem} Gave up after {self.retry_s:g} s (callbacks.save_retry_s). Checkpoints in {self.run_dir}: {kept}. "
                    "Free disk space and repeat the same command."
                )
            time.sleep(pause_s)
            problem, continues = self._begin(trainer)
            problem = self._outcome() if continues else problem

    def _scored_now(self, trainer: pl.Trainer) -> bool:
        return self.scores is not None and self.scores.scored_step == trainer.global_step

    def _better(self, trainer: pl.Trainer) -> float | None:
        """Return the value of `monitor` if it is the best so far, else None."""
        if self.monitor is None:
            return None
        self.settle()  # a failed save takes its value of `best` back
        value = trainer.callback_metrics.get(self.monitor)
        if value is None:
            raise ConfigError(
                f"monitor={self.monitor} was not measured. Available metrics: {', '.join(sorted(trainer.callback_metrics))}."
            )
        if not math.isfinite(value.item()):
            return None
        better = self.best is None or (value.item() < self.best if self.mode == "min" else value.item() > self.best)
        return value.item() if better else None


def _problem(error: ClipExpError | None) -> str | None:
    """Return the message of a checkpoint that could not be written; raise other errors."""
    if error is not None and not isinstance(error, CheckpointError):
        raise error
    return None if error is None else str(error)


class Preempted(Exception):
    """Exception that ends a run after a signal, once the checkpoint of the current step is written."""


class TimeIsUp(Preempted):
    """Exception that ends a run after `trainer.max_time`, as after a signal."""


@dataclass(eq=False, repr=False)
class Preemption(pl.Callback):
    """Callback that saves and ends the run at the end of the step in which a signal arrived, or `max_time_s` was over.

    Lightning's own handler stops each rank when its signal arrives, but ranks that stop at different steps wait for each other forever.
    Here the ranks agree at every step, by a collective on a CPU tensor, which does not synchronize with a GPU. If the step is due for
    validation, it is validated first, so that nothing is missing after resuming. It is not validated otherwise: the measurement would
    count for `patience`, and the resumed run would differ from an uninterrupted one. A failed save is retried; see `Checkpointer.save`.

    Lightning's `max_time` counts the time before an interruption as well, so the same command could not resume the run.
    """

    request: StopRequest  # set by the signal handler of `ranks.failure.note_signals`
    max_time_s: float = math.inf  # seconds since the first step of this start of the run
    checkpointer: Checkpointer | None = field(default=None, init=False)
    _end_s: float = field(default=math.inf, init=False)
    _stopping: type[Preempted] | None = field(default=None, init=False)

    def take_over(self, trainer: pl.Trainer, checkpointer: Checkpointer) -> None:
        """Replace Lightning's own signal handlers in `trainer`."""
        self.checkpointer = checkpointer
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._end_s = time.monotonic() + self.max_time_s

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        signaled, late = self.request.received, time.monotonic() >= self._end_s
        if group.world_size() > 1:
            flags = torch.tensor([signaled, late], dtype=torch.int32)
            dist.all_reduce(flags, dist.ReduceOp.MAX)
            signaled, late = map(bool, flags.tolist())
        if trainer.global_step < pl_module.total_steps:
            self._stopping = Preempted if signaled else TimeIsUp if late else None
        if self._stopping and not validation_due(trainer, pl_module.total_steps):
            self._stop(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self._stopping:
            self._stop(trainer)

    def _stop(self, trainer: pl.Trainer) -> None:
        assert self.checkpointer is not None
        self.checkpointer.save_last(trainer)
        raise self._stopping or Preempted
