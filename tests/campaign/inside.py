"""What a campaign changes inside the processes of a run: the clock, what a file operation does, and gradients.

The changes of the clock and of file operations are made before the command begins, so its ranks and workers have them too.
"""

import errno
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta, tzinfo
from functools import wraps
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from clip_exp import runs

LAUNCHER = "launcher"


@dataclass(frozen=True)
class Clock:
    """A wall clock that is wrong from the start, and jumps once. Monotonic clocks do not change."""

    before_s: float  # added to the time until the jump
    after_s: float  # added from then on
    jumps_after_s: float  # from the start of the command

    def __call__(self) -> None:
        start_s, now, now_ns = time.monotonic(), time.time, time.time_ns

        def added_s() -> float:
            return self.after_s if time.monotonic() - start_s > self.jumps_after_s else self.before_s

        class Wrong(datetime):
            @classmethod
            def now(cls, tz: tzinfo | None = None) -> "Wrong":
                return super().now(tz) + timedelta(seconds=added_s())

        time.time = lambda: now() + added_s()
        time.time_ns = lambda: now_ns() + int(added_s() * 1e9)
        runs.datetime = Wrong  # type: ignore[attr-defined]


OPERATIONS = ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir")
WRITING = ("fsync", "rename", "replace", "mkdir")  # those that a full disk refuses


@dataclass
class AtOperation:
    """Acts at operations on files of the output folder, in one process."""

    process: str  # the launcher, or the number of a rank
    folder: Path  # the output folder
    first: int  # number of the first operation at which it acts
    last: int
    after: bool  # acts after the operation, not before
    act: Callable[[], None]
    operations: tuple[str, ...] = OPERATIONS
    count: int = field(default=0, init=False)  # operations so far

    def __call__(self) -> None:
        for name in self.operations:
            setattr(os, name, self._replaced(getattr(os, name)))

    def _replaced(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(operation)
        def replaced(path: Any, *arguments: Any, **named: Any) -> Any:
            due = self._is_due(path, named.get("dir_fd"))
            if due and not self.after:
                self.act()
            result = operation(path, *arguments, **named)
            if due and self.after:
                self.act()
            return result

        return replaced

    def _is_due(self, path: Any, folder: int | None) -> bool:
        if os.environ.get("RANK", LAUNCHER) != self.process:
            return False
        inside = os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else os.fspath(path)
        if folder is not None:
            inside = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), inside)
        if not str(inside).startswith(str(self.folder)):
            return False
        self.count += 1
        return self.first <= self.count <= self.last


def kill_itself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_launcher() -> None:
    """Kill the launcher of this rank, with which the kernel kills this rank."""
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(5)


def find_no_space() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class NonFiniteGradient(pl.Callback):
    """Makes the gradient of one rank infinite in some steps, while its loss is what it is; for `callbacks.extra`."""

    def __init__(self, rank: int, steps: list[int]) -> None:
        self.rank, self.steps = rank, steps

    def on_before_backward(self, trainer: pl.Trainer, pl_module: Any, loss: torch.Tensor) -> None:
        if trainer.global_rank == self.rank and trainer.global_step + 1 in self.steps:
            loss.register_hook(lambda gradient: gradient * torch.inf)
