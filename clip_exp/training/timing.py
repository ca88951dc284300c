"""How long steps take, and what for: waiting for data, or computing."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch

_timed_event = partial(torch.cuda.Event, enable_timing=True)


@dataclass(frozen=True)
class StepTimes:
    """What some steps took together, in seconds.

    Attributes:
        waited_s: nothing was computed, because the next batch was not there.
        computed_s: forward, backward and update.
    """

    steps: int = 0
    waited_s: float = 0.0
    computed_s: float = 0.0

    @property
    def wait_s(self) -> float:
        """Per step."""
        return self.waited_s / max(self.steps, 1)

    @property
    def compute_s(self) -> float:
        """Per step."""
        return self.computed_s / max(self.steps, 1)

    @property
    def total_s(self) -> float:
        return self.waited_s + self.computed_s

    @property
    def waiting(self) -> float:
        """Share of the time that went into waiting."""
        return self.waited_s / self.total_s if self.total_s else 0.0

    def __add__(self, other: "StepTimes") -> "StepTimes":
        return StepTimes(self.steps + other.steps, self.waited_s + other.waited_s, self.computed_s + other.computed_s)


class StepClock:
    """Adds up the time of this rank's steps. What lies between a step's end and the next one's begin counts only as far as it
    was waiting for the next batch: validation, checkpoints and the scoring of tasks do not.

    Args:
        waited_s: seconds that the process had waited for batches before the first step to be measured.
    """

    def __init__(self, waited_s: float = 0.0) -> None:
        self._waited_s = waited_s
        self._started_s = 0.0
        self._times = StepTimes()

    def begin(self, waited_s: float) -> None:
        """A step begins, its batch is there; `waited_s`: seconds that the process has waited for batches so far."""
        self._times += StepTimes(waited_s=self._since_last(waited_s))
        self._started_s = time.perf_counter()

    def end(self) -> None:
        """The step has ended: everything of it has been computed, or, on a GPU, asked for."""
        self._times += StepTimes(1, computed_s=time.perf_counter() - self._started_s)

    def take(self) -> StepTimes:
        """Of the steps since the last call."""
        times, self._times = self._times, StepTimes()
        return times

    def _since_last(self, waited_s: float) -> float:
        waited_s, self._waited_s = waited_s - self._waited_s, waited_s
        return waited_s


class _Marks(NamedTuple):
    """Of a step on a GPU: events before and after it, and how long the process waited for its batch."""

    begin: Any
    end: Any
    waited_s: float


class GPUClock(StepClock):
    """The same on a GPU, which works off what the process has asked for while that goes on and may wait for data already.

    The GPU notes when it comes to the begin and to the end of each step, and nobody waits for these notes. Computing is the time
    from begin to end; waiting is what the GPU stood idle between two steps, as far as the process waited for data meanwhile.
    The process's own times would call waiting what the GPU has used well, and computing what is only asking.
    """

    def __init__(self, waited_s: float = 0.0, event: Callable[[], Any] = _timed_event) -> None:
        super().__init__(waited_s)
        self._event = event
        self._pending: deque[_Marks] = deque()
        self._last_end: Any = None

    def begin(self, waited_s: float) -> None:
        """See `StepClock`."""
        self._pending.append(_Marks(self._event(), self._event(), self._since_last(waited_s)))
        self._pending[-1].begin.record()

    def end(self) -> None:
        """See `StepClock`."""
        self._pending[-1].end.record()
        while self._pending and self._pending[0].end.query():
            self._count(self._pending.popleft())

    def take(self) -> StepTimes:
        """See `StepClock`; waits until the GPU has ended the last step."""
        for marks in self._pending:
            marks.end.synchronize()
            self._count(marks)
        self._pending.clear()
        return super().take()

    def _count(self, marks: _Marks) -> None:
        idle_s = marks.waited_s if self._last_end is None else self._last_end.elapsed_time(marks.begin) / 1000
        self._times += StepTimes(1, min(idle_s, marks.waited_s), marks.begin.elapsed_time(marks.end) / 1000)
        self._last_end = marks.end


def step_clock(device: torch.device, waited_s: float) -> StepClock:
    """The clock for a device."""
    return GPUClock(waited_s) if device.type == "cuda" else StepClock(waited_s)
