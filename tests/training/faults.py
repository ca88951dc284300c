"""Faults of a rank in the middle of a training run, for `callbacks.extra`."""

import os
import time
from typing import Any

import pytorch_lightning as pl
import torch

ALLOWED = {"CLIP_EXP_ALLOWED_TARGETS": "tests.training"}


class Fault(pl.Callback):
    """Fails on one rank in one step.

    Args:
        kind: raise, memory (a device has too little) or exit (without a word).
        blocks: what tidies up after a failure never returns, as with NCCL where other ranks are in a collective.
    """

    def __init__(self, kind: str, rank: int, step: int = 3, blocks: bool = False) -> None:
        self.kind = kind
        self.rank = rank
        self.step = step
        self.blocks = blocks

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self.blocks:
            torch.distributed.destroy_process_group = lambda *_: time.sleep(600)
            trainer.strategy.teardown = lambda: time.sleep(600)  # type: ignore[method-assign]

    def on_before_zero_grad(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        if trainer.global_rank == self.rank and trainer.global_step + 1 == self.step:
            if self.kind == "exit":
                os._exit(9)
            if self.kind == "memory":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            raise ValueError("a bug of this rank")


def overrides(kind: str, rank: int, *, blocks: bool) -> tuple[str, ...]:
    """Arguments of `train.py` for a fault in step 3."""
    fault = f"_target_:tests.training.faults.Fault,kind:{kind},rank:{rank},blocks:{str(blocks).lower()}"
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
