"""Stopping a run between two steps, on all ranks at the same one, when a signal asks for it."""

from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist

from clip_exp.ranks.signals import StopRequest
from clip_exp.training.callbacks import Checkpointer, validation_due


class Preempted(Exception):
    """Raised at the end of a step whose checkpoint is written."""


class Preemption(pl.Callback):
    """Saves and ends the run at the end of the step in which a signal came.

    Lightning's own handling lets each rank stop when its signal arrives, and ranks that stop at different steps wait for
    each other forever. Here the ranks agree at every step, through a CPU tensor, which does not wait for a GPU. A step that
    is to be validated is validated first, so that resuming misses nothing. A save that fails is retried; see `Checkpointer.save`.

    Args:
        request: the signal, noted by `ranks.signals.note_signals`.
    """

    def __init__(self, request: StopRequest) -> None:
        self.request = request
        self.checkpointer: Checkpointer | None = None
        self._stopping = False

    def take_over(self, trainer: pl.Trainer, checkpointer: Checkpointer) -> None:
        """Act for `trainer`, in the place of Lightning's own signal handlers."""
        self.checkpointer = checkpointer
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._stopping = self._agreed() and trainer.global_step < pl_module.total_steps
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

    def _agreed(self) -> bool:
        requested = self.request.received
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return requested
        flag = torch.tensor([requested], dtype=torch.int32)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag.item())
