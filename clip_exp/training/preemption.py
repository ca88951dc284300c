"""Stopping a run between two steps, on all ranks at the same one, when a signal asks for it."""

import signal
import threading
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist

from clip_exp.training.callbacks import Checkpointer

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Preempted(Exception):
    """Raised at the end of a step whose checkpoint is written."""


class Preemption(pl.Callback):
    """Saves and ends the run at the end of the step in which a signal came; the second signal acts at once.

    Lightning's own handling lets each rank stop when its signal arrives, and ranks that stop at different steps wait for
    each other forever. Here the ranks agree at every step, through a CPU tensor, which does not wait for a GPU.
    """

    def __init__(self, checkpointer: Checkpointer) -> None:
        self.checkpointer = checkpointer
        self.asked = False
        self._before: dict[int, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in SIGNALS}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._agreed():
            if self.checkpointer.saved_step != trainer.global_step:
                self.checkpointer.save(trainer)
            raise Preempted

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._restore()

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        self._restore()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)

    def _agreed(self) -> bool:
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return self.asked
        flag = torch.tensor([self.asked], dtype=torch.int32)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag.item())

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
