"""What happens around the steps: validation at the end, checkpoints, averaged weights."""

import copy
import logging
import math
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
from clip_exp.errors import ConfigError
from clip_exp.ranks.group import from_main
from clip_exp.storage import remove_folder

if TYPE_CHECKING:
    from clip_exp.training.tasks import TaskScores

log = logging.getLogger(__name__)
KEEP_LAST = 2
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

    A checkpoint of a step that is validated is written after the validation. The last two and the best stay.

    Args:
        run_dir: the run's folder.
        io: the trainer's checkpoint writer.
        monitor: name of a metric of validation or of a task, or None.
        mode: whether `min` or `max` of `monitor` is best; `auto` guesses from its name.
        metadata: noted in every manifest.
        pause: called before anything at the end of a step that is not training.
        scores: of the run's tasks, if it has any.
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
    ) -> None:
        self.run_dir = run_dir
        self.io = io
        self.every_n_steps = every_n_steps
        self.monitor = monitor
        self.mode = monitor_mode(monitor, mode)
        self.metadata = metadata
        self.pause = pause
        self.scores = scores
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
        better = self._scored_now(trainer) and is_of_task(self.monitor) and self._improves(trainer)
        if better or trainer.global_step % self.every_n_steps == 0:
            self.save(trainer, best=better)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        better = (self._scored_now(trainer) or not is_of_task(self.monitor)) and self._improves(trainer)
        if better or trainer.global_step % self.every_n_steps == 0 or trainer.global_step >= pl_module.total_steps:
            self.save(trainer, best=better, metrics=last_validation(trainer))

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self.saved_step != trainer.global_step:
            self.save(trainer)

    def save(self, trainer: pl.Trainer, best: bool = False, metrics: dict[str, float] | None = None) -> None:
        """Write the checkpoint of the present step on all ranks; rank 0 then removes what is no longer needed."""
        self.pause()
        path = folder_of(self.run_dir, trainer.global_step)
        of_tasks = self.scores.values if self.scores is not None and self._scored_now(trainer) else {}
        self.io.metadata = {**self.metadata, "best": best, "metrics": {**(metrics or {}), **of_tasks}}
        trainer.save_checkpoint(path)
        self.saved_step = trainer.global_step
        # All ranks wait until it is done: in the next step they would, and it would count as computing.
        from_main(self._prune)

    def _scored_now(self, trainer: pl.Trainer) -> bool:
        return self.scores is not None and self.scores.scored_step == trainer.global_step

    def _improves(self, trainer: pl.Trainer) -> bool:
        if self.monitor is None:
            return False
        value = trainer.callback_metrics.get(self.monitor)
        if value is None:
            raise ConfigError(
                f"monitor={self.monitor} was not measured. There are: {', '.join(sorted(trainer.callback_metrics))}."
            )
        if not math.isfinite(value.item()):
            return False
        better = self.best is None or (value.item() < self.best if self.mode == "min" else value.item() > self.best)
        if better:
            self.best = value.item()
        return better

    def _prune(self) -> None:
        found = manifests(self.run_dir)
        marked = [path for path, manifest in found.items() if manifest.best]
        needed = {*list(found)[-KEEP_LAST:], *marked[-1:]}
        for path in found:
            if path not in needed and step_of(path) <= (self.saved_step or 0):
                remove_folder(path)


def last_validation(trainer: pl.Trainer) -> dict[str, float]:
    """What the last validation found."""
    return {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith(VALIDATION)}


def is_of_task(monitor: str | None) -> bool:
    """Whether a metric is a task's, not validation's."""
    return monitor is not None and not monitor.startswith(VALIDATION)


def monitor_mode(monitor: str | None, mode: str) -> str:
    """`min` or `max`: which way a metric gets better."""
    if mode != "auto":
        return mode
    return "min" if monitor and any(word in monitor for word in ("loss", "rank")) else "max"


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
