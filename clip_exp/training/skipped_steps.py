"""Steps whose gradient is not finite: skipped on all ranks alike, counted, and the end of a run that skips too many in a row.

A step is skipped if the norm of its gradient is not finite. It then changes neither weights, optimizer state, buffers nor averaged
weights, but counts as a step: the schedule and the data advance. The norm is that of the averaged gradient, so all ranks decide alike.

The decision stays on the device, because a process that reads it in every step cannot prepare the next step while a GPU computes:

    fused Adam and AdamW      the kernel itself skips (`found_inf`, made for loss scaling)
    other optimizers          the process reads the decision, and removes the gradients
    DeepSpeed                 its own check, whose result the process knows anyway

The process reads the decisions of the last steps at logged steps and before every save.
"""

import logging
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer

from clip_exp.errors import NumericError

log = logging.getLogger(__name__)

UNREAD_STEPS = 1000  # decisions on the device that are not read yet; more are read before the next logged step
LOWEST_SCALE = 1.0  # loss scale of float16 below which an overflow is not the fault of the scale
LISTED_ROWS = 5
REMEDIES = (
    "Lower optimizer.lr, increase scheduler.warmup_steps, lower trainer.gradient_clip_val, or set precision=32-true"
)


def skip_step(optimizer: Optimizer, skipped: Tensor) -> None:
    """Make an optimizer's step change nothing if `skipped` is true; call it before the step, after the gradients are complete.

    Args:
        optimizer: the optimizer.
        skipped: bool tensor of one element on the device of the parameters.
    """
    if isinstance(optimizer, Adam | AdamW) and all(group["fused"] for group in optimizer.param_groups):
        optimizer.found_inf = skipped.float()  # type: ignore[attr-defined]
    elif skipped.item():
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None  # an optimizer leaves parameters without gradient and their state unchanged


class SkippedSteps(pl.Callback):
    """Callback that counts the skipped steps of a run, and ends it if more than `max_in_a_row` follow each other.

    Under float16, overflows by which the loss scale is found are not counted: the loss is finite, and the scale is above 1.

    Args:
        max_in_a_row: steps in a row that may be skipped.
        rows: function that returns the names of the rows of a step, counted from 1.

    Attributes:
        now: whether the last step was skipped; a bool tensor on the device.
        total: steps that were skipped since the start of the run, up to the last reading.
        in_a_row: steps at the end of those that were skipped.
    """

    def __init__(self, max_in_a_row: int, rows: Callable[[int], list[str]]) -> None:
        self.max_in_a_row = max_in_a_row
        self.rows = rows
        self.now = torch.tensor(False)
        self.total = self.in_a_row = 0
        self._unread: list[Tensor] = []
        self._buffers: list[Tensor] = []
        self._before: list[Tensor] = []  # the buffers before the step

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total, "in_a_row": self.in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.total, self.in_a_row = state_dict["total"], state_dict["in_a_row"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        # Listed once: iterating over the modules in every step is slow enough to make a GPU wait.
        self._buffers = list(pl_module.buffers())

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        # A forward pass changes the statistics of batch normalization, before it is known whether the step is skipped.
        self._before = [buffer.clone() for buffer in self._buffers]

    @torch.no_grad()
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        engine = getattr(trainer.strategy, "deepspeed_engine", None)
        loss = pl_module.step_metrics["train/loss"]
        if engine is not None:
            pl_module.skipped = torch.full((), bool(engine.optimizer.overflow), device=loss.device)
        self.now = pl_module.skipped
        if self._buffers:
            kept = [torch.where(self.now, *pair) for pair in zip(self._before, self._buffers, strict=True)]
            torch._foreach_copy_(self._buffers, kept)
        scale = _loss_scale(trainer, engine)
        self._unread.append(self.now if scale <= LOWEST_SCALE else self.now & ~torch.isfinite(loss))
        if len(self._unread) == UNREAD_STEPS:
            self.read(trainer)

    def read(self, trainer: pl.Trainer) -> None:
        """Read which of the last steps were skipped, and warn about them. All ranks must call this.

        Raises:
            NumericError: more than `max_in_a_row` steps in a row were skipped.
        """
        if not self._unread:
            return
        # Under float16, only the rank with the broken sample may have a loss that is not finite.
        decisions = trainer.strategy.reduce(torch.stack(self._unread).int(), reduce_op="max").tolist()
        first = trainer.global_step - len(decisions) + 1
        self._unread = []
        skipped = [step for step, decision in enumerate(decisions, start=first) if decision]
        self.total += len(skipped)
        longest = self.in_a_row
        for decision in decisions:
            self.in_a_row = self.in_a_row + 1 if decision else 0
            longest = max(longest, self.in_a_row)
        if not skipped:
            return
        what = f"{_listed(skipped)} had a gradient that is not finite and left the weights unchanged. {self._about_rows(skipped)}"
        if longest > self.max_in_a_row:
            raise NumericError(
                f"{what} {longest} steps in a row were skipped, more than max_skipped_steps={self.max_in_a_row}. {REMEDIES}. "
                "The last checkpoint is not affected."
            )
        log.warning("%s", what)

    def _about_rows(self, steps: list[int]) -> str:
        """Return a sentence about the rows of skipped steps: those that all steps have in common, or those of the last step."""
        batches = [self.rows(step) for step in steps[-LISTED_ROWS:]]
        common = set(batches[0]).intersection(*batches[1:])
        if len(batches) > 1 and common:
            return f"All of them contain {', '.join(sorted(common)[:LISTED_ROWS])}."
        listed = ", ".join(batches[-1][:LISTED_ROWS])
        more = f" and {len(batches[-1]) - LISTED_ROWS:,} more" if len(batches[-1]) > LISTED_ROWS else ""
        return f"The rows of step {steps[-1]:,}: {listed}{more}."


def _loss_scale(trainer: pl.Trainer, engine: Any) -> float:
    """Return the dynamic loss scale of float16; 1 for other precisions."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is not None:
        return float(scaler.get_scale())  # its optimizer step has read the device already
    return float(getattr(getattr(engine, "optimizer", None), "cur_scale", LOWEST_SCALE))


def _listed(steps: list[int]) -> str:
    """Return `Step 3`, `Steps 3 and 5`, or `17 of the steps 3 to 25`."""
    if len(steps) == 1:
        return f"Step {steps[0]:,}"
    if len(steps) > LISTED_ROWS:
        return f"{len(steps):,} of the steps {steps[0]:,} to {steps[-1]:,}"
    return f"Steps {', '.join(f'{step:,}' for step in steps[:-1])} and {steps[-1]:,}"
