from dataclasses import dataclass, field

import pytest

from clip_exp.training.timing import GPUClock, StepClock, StepTimes


@dataclass
class Queue:
    """A GPU that works off what it is asked for, by a clock in seconds that the process and it share."""

    now_s: float = 0.0
    busy_until_s: float = 0.0

    def now(self) -> float:
        return self.now_s

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


def gpu_clock(queue: Queue) -> GPUClock:
    return GPUClock(now=queue.now, event=queue.event)


def test_steps_are_split_into_waiting_and_computing_and_the_wall_time_has_what_lies_between() -> None:
    queue, waited_s = Queue(), 100.0
    clock = StepClock(waited_s, queue.now)
    for _ in range(3):
        queue.now_s += 0.5
        waited_s += 0.5
        clock.begin(waited_s)
        queue.now_s += 0.02
        clock.end()
        queue.now_s += 0.25  # averaging of weights
    times = clock.take()
    assert (times.steps, times.wait_s) == (3, 0.5)
    assert times.compute_s == pytest.approx(0.02)
    assert times.step_s == pytest.approx(0.77)
    assert clock.take() == StepTimes()


def test_the_wall_time_begins_with_the_wait_for_the_first_batch() -> None:
    queue = Queue(now_s=1000.0)
    clock = StepClock(now=queue.now)
    queue.now_s += 60.0  # workers start, or a checkpoint is read
    clock.begin(0.5)
    queue.now_s += 0.25
    clock.end()
    assert clock.take() == StepTimes(1, waited_s=0.5, computed_s=0.25, wall_s=0.75)


def test_a_pause_is_left_out_up_to_the_wait_for_the_next_batch() -> None:
    queue = Queue()
    clock = StepClock(now=queue.now)
    clock.begin(0.0)
    queue.now_s += 1.0
    clock.end()
    queue.now_s += 0.25  # averaging of weights
    clock.pause()
    queue.now_s += 60.0  # a validation
    clock.pause()
    queue.now_s += 60.0  # a save
    queue.now_s += 0.5  # a wait for the next batch
    clock.begin(0.5)
    queue.now_s += 1.0
    clock.end()
    assert clock.take() == StepTimes(2, waited_s=0.5, computed_s=2.0, wall_s=2.75)


def run_on_gpu(steps: int, load_s: float, work_s: float, ask_s: float = 0.01) -> StepTimes:
    """Steps of a process that prepares a batch in `load_s`, then asks the GPU for `work_s` of work, and never waits for it."""
    queue, waited_s = Queue(), 0.0
    clock = gpu_clock(queue)
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


@pytest.mark.parametrize(
    ("copy_s", "step_s", "average_s", "between_s", "computing_s"),
    [
        pytest.param(0.003, 0.040, 0.001, 0.001, 0.043, id="the GPU also copies batches and averages weights"),
        pytest.param(0.0005, 0.004, 0.0, 0.012, 0.006, id="the GPU waits for the process"),
    ],
)
def test_the_rate_on_a_gpu_is_that_of_the_wall_clock(copy_s, step_s, average_s, between_s, computing_s) -> None:
    queue = Queue()
    clock = gpu_clock(queue)
    for _ in range(100):
        queue.now_s = max(queue.now_s, queue.busy_until_s - step_s)
        queue.now_s += between_s
        clock.begin(0.0)
        queue.compute(copy_s)
        queue.now_s += 0.002
        queue.compute(step_s)
        clock.end()
        queue.compute(average_s)
    times = clock.take()
    assert times.steps / times.wall_s == pytest.approx(100 / max(queue.now_s, queue.busy_until_s), rel=0.02)
    assert times.compute_s == pytest.approx(computing_s)
    assert times.waited_s == 0.0


def test_a_pause_on_a_gpu_begins_when_it_has_done_what_it_was_asked_for() -> None:
    queue = Queue()
    clock = gpu_clock(queue)
    for waited_s in (0.0, 0.5):
        clock.begin(waited_s)
        queue.compute(1.0)
        clock.end()
        queue.compute(0.25)  # averaging of weights
        clock.pause()
        queue.now_s += 60.5  # a validation, and a wait of 0.5 s
    assert clock.take() == StepTimes(2, waited_s=0.5, computed_s=2.0, wall_s=3.0)


def test_times_of_steps_add_up() -> None:
    times = StepTimes(2, 1.0, 3.0, 4.0) + StepTimes(3, 4.0, 2.0, 6.0)
    assert times == StepTimes(5, 5.0, 5.0, 10.0)
    assert (times.wait_s, times.compute_s, times.step_s, times.waiting) == (1.0, 1.0, 2.0, 0.5)
    assert StepTimes().waiting == 0.0
