"""What happens around the steps: validation at the end, checkpoints, averaged weights."""

import copy
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping
from torch import nn

from clip_exp.checkpoints.discovery import folder_of, manifests, step_of
from clip_exp.checkpoints.io import EMA_KEY, SafeCheckpointIO
from clip_exp.checkpoints.writer import MANIFEST
from clip_exp.errors import CheckpointError, ConfigError
from clip_exp.ranks.group import from_main
from clip_exp.reports.metric_names import better
from clip_exp.storage import remove_folder

if TYPE_CHECKING:
    from clip_exp.training.tasks import TaskScores

log = logging.getLogger(__name__)
KEEP_LAST = 2
RETRY_PAUSE_S = 10.0  # between attempts to write the last checkpoint
VALIDATION = "val/"  # what names of validation's metrics begin with


def validation_due(trainer: pl.Trainer, total_steps: int) -> bool:
    """Whether Lightning validates after the step that just ended."""
    if not trainer.enable_validation or trainer.val_check_batch is None:
        return False
    step = trainer.global_step
    return step % int(trainer.val_check_batch) == 0 or step == total_steps or trainer.should_stop


class StopAtEnd(pl.Callback):
    """Lets the last step be validated, whatever the interval: Lightning validates before it stops.

    A run that had lost its `patience` when it was interrupted does not train on.
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        early = [callback for callback in trainer.callbacks if isinstance(callback, EarlyStopping)]  # type: ignore[attr-defined]
        if (
            any(callback.wait_count >= callback.patience for callback in early)
            or trainer.global_step >= pl_module.total_steps
        ):
            trainer.should_stop = True

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step >= pl_module.total_steps:
            trainer.should_stop = True


class Checkpointer(pl.Callback):
    """Writes `checkpoints/step-<n>/` at ends of steps: every `every_n_steps`, at the end, and when `monitor` is best.

    A checkpoint of a step that is validated is written after the validation. The last two and the best stay. One that cannot
    be written is left out with a warning, but for the last one of a process, which is retried.

    Args:
        run_dir: the run's folder.
        io: the trainer's checkpoint writer.
        monitor: name of a metric of validation or of a task, or None.
        mode: whether `min` or `max` of `monitor` is best; `auto` goes by the metric (`reports.metric_names`).
        metadata: noted in every manifest.
        pause: called before anything at the end of a step that is not training.
        scores: of the run's tasks, if it has any.
        retry_s: seconds for which the last checkpoint is retried.
    """

    def __init__(
        self,
        run_dir: Path,
        io: SafeCheckpointIO,
        every_n_steps: int,
        monitor: str | None,
        mode: str,
        metadata: dict[str, Any],
        pause: Callable[[], None],
        scores: "TaskScores | None" = None,
        *,
        retry_s: float,
    ) -> None:
        self.run_dir = run_dir
        self.io = io
        self.every_n_steps = every_n_steps
        self.monitor = monitor
        self.mode = monitor_mode(monitor, mode)
        self.metadata = metadata
        self.pause = pause
        self.scores = scores
        self.retry_s = retry_s
        self.best: float | None = None
        self.saved_step: int | None = None

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
            last: of this process. If it cannot be written, that is retried for `retry_s`; any other is left to the next interval.

        Raises:
            CheckpointError: the last checkpoint could not be written.
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
        """Try again until the checkpoint is written.

        Raises:
            CheckpointError: `retry_s` are over.
        """
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


def last_validation(trainer: pl.Trainer) -> dict[str, float]:
    """What the last validation found."""
    return {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith(VALIDATION)}


def is_of_task(monitor: str | None) -> bool:
    """Whether a metric is a task's, not validation's."""
    return monitor is not None and not monitor.startswith(VALIDATION)


def monitor_mode(monitor: str | None, mode: str) -> str:
    """Return `min` or `max`: which values of `monitor` are better, by `mode` or, where that is `auto`, by the metric itself."""
    return better(monitor or "") if mode == "auto" else mode


class AveragedWeights(pl.Callback):
    """An exponential moving average of the model's weights: `ema.safetensors` in every checkpoint.

    Args:
        decay: share of the old average that a step keeps.
        every_n_steps: optimizer steps between updates.
    """

    def __init__(self, decay: float, every_n_steps: int = 1) -> None:
        self.decay = decay
        self.every_n_steps = every_n_steps
        self.average: nn.Module | None = None
        self._loaded: dict[str, Any] | None = None

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
