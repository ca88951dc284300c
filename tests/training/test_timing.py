import time
from dataclasses import dataclass, field

import pytest

from clip_exp.training.timing import GPUClock, StepClock, StepTimes


def test_waiting_and_computing_are_told_apart_and_what_lies_between_steps_is_neither(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now_s = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now_s)
    clock = StepClock(waited_s=100.0)
    for step in range(3):
        clock.begin(waited_s=100.0 + 0.5 * (step + 1))
        now_s += 0.02
        clock.end()
        now_s += 0.2  # a validation
    times = clock.take()
    assert (times.steps, times.wait_s) == (3, 0.5)
    assert times.compute_s == pytest.approx(0.02)
    assert clock.take() == StepTimes()


@dataclass
class Queue:
    """A GPU that works off what it is asked for, by a clock in seconds that the process and it share."""

    now_s: float = 0.0
    busy_until_s: float = 0.0

    def compute(self, work_s: float) -> None:
        self.busy_until_s = max(self.busy_until_s, self.now_s) + work_s

    def event(self) -> "Event":
        return Event(self)


@dataclass
class Event:
    queue: Queue
    at_s: float = field(default=0.0)

    def record(self) -> None:
        self.at_s = max(self.queue.busy_until_s, self.queue.now_s)

    def query(self) -> bool:
        return self.queue.now_s >= self.at_s

    def synchronize(self) -> None:
        self.queue.now_s = max(self.queue.now_s, self.at_s)

    def elapsed_time(self, end: "Event") -> float:
        return 1000 * (end.at_s - self.at_s)


def run_on_gpu(steps: int, load_s: float, work_s: float, ask_s: float = 0.01) -> StepTimes:
    """Steps of a process that prepares a batch in `load_s`, then asks the GPU for `work_s` of work, and never waits for it."""
    queue, waited_s = Queue(), 0.0
    clock = GPUClock(event=queue.event)
    for _ in range(steps):
        queue.now_s = max(queue.now_s, queue.busy_until_s - work_s)  # a GPU takes no more than a step in advance
        queue.now_s += load_s
        waited_s += load_s
        clock.begin(waited_s)
        queue.compute(work_s)
        queue.now_s += ask_s
        clock.end()
    return clock.take()


def test_a_gpu_that_starves_is_told_from_one_that_works_while_the_process_waits() -> None:
    starved = run_on_gpu(steps=50, load_s=1.0, work_s=0.4)
    assert starved.steps == 50
    assert starved.compute_s == pytest.approx(0.4)
    assert starved.wait_s == pytest.approx(0.61, abs=0.02)
    busy = run_on_gpu(steps=50, load_s=0.3, work_s=0.4)
    assert busy.compute_s == pytest.approx(0.4)
    assert busy.wait_s < 0.02


def test_a_pause_between_steps_counts_only_as_far_as_data_was_waited_for() -> None:
    queue = Queue()
    clock = GPUClock(event=queue.event)
    for waited_s in (0.0, 0.1):
        clock.begin(waited_s)
        queue.compute(1.0)
        clock.end()
        queue.now_s += 60.0  # a validation, and a wait of 0.1 s
    times = clock.take()
    assert (times.waited_s, times.computed_s) == (0.1, 2.0)


def test_times_of_steps_add_up() -> None:
    times = StepTimes(2, 1.0, 3.0) + StepTimes(3, 4.0, 2.0)
    assert times == StepTimes(5, 5.0, 5.0)
    assert (times.wait_s, times.compute_s, times.waiting) == (1.0, 1.0, 0.5)
    assert StepTimes().waiting == 0.0
