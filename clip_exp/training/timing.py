"""How long steps take, and what for: waiting for data, computing, and what lies between."""

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
    """Times of some steps together, in seconds.

    Attributes:
        waited_s: nothing was computed, because the next batch was not there.
        computed_s: the batch's copy to the device, forward, backward and update.
        wall_s: all of it by the wall clock, and what is neither: averaging of weights, logging, agreement of the ranks, a GPU
            that idles because the process is slower than it.
    """

    steps: int = 0
    waited_s: float = 0.0
    computed_s: float = 0.0
    wall_s: float = 0.0

    @property
    def wait_s(self) -> float:
        """Per step."""
        return self.waited_s / max(self.steps, 1)

    @property
    def compute_s(self) -> float:
        """Per step."""
        return self.computed_s / max(self.steps, 1)

    @property
    def step_s(self) -> float:
        """Per step, by the wall clock."""
        return self.wall_s / max(self.steps, 1)

    @property
    def waiting(self) -> float:
        """Fraction of the wall time that went into waiting."""
        return self.waited_s / self.wall_s if self.wall_s else 0.0

    def __add__(self, other: "StepTimes") -> "StepTimes":
        return StepTimes(
            self.steps + other.steps,
            self.waited_s + other.waited_s,
            self.computed_s + other.computed_s,
            self.wall_s + other.wall_s,
        )


class StepClock:
    """Clock of this rank's steps. Wall time runs from the first batch on, except from `pause` to the next batch.

    Args:
        waited_s: seconds that the process had waited for batches before the first step to be measured.
        now: the time, in seconds.
    """

    def __init__(self, waited_s: float = 0.0, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._waited_s = waited_s
        self._began_s = 0.0
        self._counted_to_s: float | None = None  # wall time has been added up to here; None: paused
        self._times = StepTimes()

    def begin(self, waited_s: float) -> None:
        """Begin a step, whose batch is there and not yet copied to the device.

        Args:
            waited_s: seconds that the process has waited for batches so far.
        """
        since_last_s, self._waited_s = waited_s - self._waited_s, waited_s
        if self._counted_to_s is None:
            self._counted_to_s = self._now() - since_last_s
        self._begin(since_last_s)

    def end(self) -> None:
        """End the step: everything of it has been computed, or, on a GPU, requested."""
        self._times += StepTimes(1, computed_s=self._now() - self._began_s)

    def pause(self) -> None:
        """Leave out what follows, until training asks for its next batch: validation, saving, the scoring of tasks."""
        self._count_wall_time()
        self._counted_to_s = None

    def take(self) -> StepTimes:
        """Return the times of the steps since the last call."""
        self._count_wall_time()
        times, self._times = self._times, StepTimes()
        return times

    def _begin(self, waited_s: float) -> None:
        self._times += StepTimes(waited_s=waited_s)
        self._began_s = self._now()

    def _count_wall_time(self) -> None:
        if self._counted_to_s is not None:
            now_s = self._now()
            self._times += StepTimes(wall_s=now_s - self._counted_to_s)
            self._counted_to_s = now_s


class _Marks(NamedTuple):
    """Events before and after a step on a GPU, and how long the process waited for the step's batch."""

    begin: Any
    end: Any
    waited_s: float


class GPUClock(StepClock):
    """The same on a GPU, which works off what the process has asked for while that goes on and may wait for data already.

    The GPU notes when it comes to the begin and to the end of each step, and nobody waits for these notes. Computing is the time
    from begin to end; waiting is what the GPU stood idle between two steps, as far as the process waited for data meanwhile.
    The process's own times would call waiting what the GPU has used well, and computing what is only asking. Wall time is
    read when the GPU has done all that it was asked for, in `take` and `pause`.
    """

    def __init__(
        self,
        waited_s: float = 0.0,
        now: Callable[[], float] = time.perf_counter,
        event: Callable[[], Any] = _timed_event,
    ) -> None:
        super().__init__(waited_s, now)
        self._event = event
        self._pending: deque[_Marks] = deque()
        self._last_end: Any = None

    def end(self) -> None:
        """See `StepClock`."""
        self._pending[-1].end.record()
        while self._pending and self._pending[0].end.query():
            self._count(self._pending.popleft())

    def _begin(self, waited_s: float) -> None:
        self._pending.append(_Marks(self._event(), self._event(), waited_s))
        self._pending[-1].begin.record()

    def _count_wall_time(self) -> None:
        last = self._event()
        last.record()
        last.synchronize()
        while self._pending:
            self._count(self._pending.popleft())
        super()._count_wall_time()

    def _count(self, marks: _Marks) -> None:
        idle_s = marks.waited_s if self._last_end is None else self._last_end.elapsed_time(marks.begin) / 1000
        self._times += StepTimes(1, min(idle_s, marks.waited_s), marks.begin.elapsed_time(marks.end) / 1000)
        self._last_end = marks.end


def step_clock(device: torch.device, waited_s: float) -> StepClock:
    """Return the clock for a device."""
    return GPUClock(waited_s) if device.type == "cuda" else StepClock(waited_s)
