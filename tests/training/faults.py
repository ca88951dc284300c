"""Faults of a rank in the middle of a training run, for `callbacks.extra`."""

import ctypes
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

ALLOWED = {"CLIP_EXP_ALLOWED_TARGETS": "tests.training"}


class Fault(pl.Callback):
    """Fails on one rank in one step.

    Args:
        kind: raise, memory (a device has too little), exit (without a word), stop (as by kill -STOP), hang, hold (hang with Python's
            lock), or worker (stop a worker of the loader).
        marker: a file that is created with the fault, and where it exists already there is no fault; empty: none.
        blocks: what tidies up after a failure never returns, as with NCCL where other ranks are in a collective.
    """

    def __init__(self, kind: str, rank: int, step: int = 3, blocks: bool = False, marker: str = "") -> None:
        self.kind = kind
        self.rank = rank
        self.step = step
        self.blocks = blocks
        self.marker = Path(marker) if marker else None

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self.blocks:
            torch.distributed.destroy_process_group = lambda *_: time.sleep(600)
            trainer.strategy.teardown = lambda: time.sleep(600)  # type: ignore[method-assign]

    def on_before_zero_grad(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        if trainer.global_rank == self.rank and trainer.global_step + 1 == self.step:
            if self.marker is not None:
                if self.marker.exists():
                    return
                self.marker.touch()
            if self.kind == "exit":
                os._exit(9)
            if self.kind == "memory":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            if self.kind == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
                return
            if self.kind == "worker":
                for worker in multiprocessing.active_children()[:1]:
                    os.kill(worker.pid or 0, signal.SIGSTOP)
                return
            if self.kind == "hang":
                time.sleep(600)
            if self.kind == "hold":
                ctypes.PyDLL(None).sleep(600)
            raise ValueError("a bug of this rank")


class Slow(pl.Callback):
    """Takes its time in every step and for every batch of a validation."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_before_zero_grad(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        time.sleep(self.seconds)

    def on_validation_batch_end(self, *_: Any) -> None:
        time.sleep(self.seconds)


class Blocking:
    """Transform that never returns from its 40th image."""

    def __init__(self, image_size: int) -> None:
        self.image_size = image_size
        self.calls = 0

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls == 40:
            time.sleep(600)
        return image[:, : self.image_size, : self.image_size]


def overrides(kind: str, rank: int, *, blocks: bool = False, marker: str = "") -> tuple[str, ...]:
    """Arguments of `train.py` for a fault in step 3."""
    fault = (
        f"_target_:tests.training.faults.Fault,kind:{kind},rank:{rank},blocks:{str(blocks).lower()},marker:'{marker}'"
    )
    return (f"+callbacks.extra.fault={{{fault}}}",)


class NotANumber(pl.Callback):
    """Makes the loss of one rank, and so its gradient, not a number in some steps."""

    def __init__(self, steps: list[int], rank: int = 0) -> None:
        self.steps = steps
        self.rank = rank

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        def spoil(module: Any, inputs: Any, loss: torch.Tensor) -> torch.Tensor:
            spoiled = trainer.training and trainer.global_step + 1 in self.steps and trainer.global_rank == self.rank
            return loss * torch.nan if spoiled else loss

        pl_module.loss.register_forward_hook(spoil)
