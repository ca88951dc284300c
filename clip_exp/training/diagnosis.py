"""Whether the loader holds training up, and what to do about it."""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from clip_exp.training.timing import StepTimes

TOLERATED = 0.2  # share of the time that may go into waiting
SETTLING_STEPS = 10  # workers start, and what they have prepared meanwhile is used up
WINDOW_STEPS = 20  # workers deliver in bursts
WINDOW_S = 2.0  # in less, a hiccup of the machine would be taken for the rule


@dataclass(frozen=True)
class Loading:
    """What a rank loads its batches with.

    Attributes:
        workers: processes; 0: training loads its own batches.
        cores: of the machine, for this rank.
        image_size: side of the pictures that training sees, pixels.
        shares_cores: training computes on these cores too.
    """

    workers: int
    cores: int
    image_size: int
    shares_cores: bool = False

    @property
    def most_workers(self) -> int:
        """As many as have a core of their own, one kept for training."""
        return max(1, self.cores - 1)


class LoaderWatch:
    """Looks at the times of steps as they come in, and speaks up once. The first steps do not count."""

    def __init__(self, loading: Loading) -> None:
        self.loading = loading
        self._steps = 0
        self._window: StepTimes | None = StepTimes()

    def add(self, times: StepTimes) -> str | None:
        """What to tell the user after these steps; None: nothing, or it was told before."""
        settled = self._steps >= max(SETTLING_STEPS, 4 * self.loading.workers)
        self._steps += times.steps
        if self._window is None or not settled:
            return None
        window = self._window + times
        enough = window.steps >= max(WINDOW_STEPS, 5 * self.loading.workers) and window.wall_s >= WINDOW_S
        held_up = enough and window.waiting > TOLERATED
        self._window = None if held_up else StepTimes() if enough else window
        return advice(window, self.loading) if held_up else None


def workers_needed(times: StepTimes, workers: int) -> int:
    """Worker processes that would keep up with training.

    While training waits, every worker works all the time: a batch costs one worker `workers` steps. Without workers it costs
    what training waits for it.
    """
    batch_s = times.step_s * workers if workers else times.wait_s
    return max(workers + 1, math.ceil(batch_s / max(times.step_s - times.wait_s, 1e-9)))


def advice(times: StepTimes, loading: Loading) -> str:
    """One message: what is slow, how much is lost, what to change."""
    needed, most = workers_needed(times, loading.workers), loading.most_workers
    lost = (
        f"The loader is the bottleneck: in the last {times.steps} steps training waited for data {100 * times.waiting:.0f} % of the time, "
        f"{seconds(times.wait_s)} of {seconds(times.step_s)} per step."
    )
    now = f"data.num_workers is {loading.workers}, and there {'are' if loading.cores > 1 else 'is'} {_cores(loading.cores)} per rank"
    side = round(loading.image_size * 256 / 224)
    smaller = f"make the pictures smaller once, to a shorter side of about {side} pixels"
    if needed <= most:
        shared = ", as far as training on the CPU leaves them cores" if loading.shares_cores else ""
        return f"{lost} {now}: data.num_workers={needed} would keep up{shared}."
    if loading.workers < most:
        return (
            f"{lost} {now}: set data.num_workers={most}. Keeping up would take about {needed} workers: "
            f"{smaller}, or train with more cores."
        )
    return f"{lost} {now}, which the workers and training use already: {smaller}, or train with more cores."


def waiting_share(rows: list[dict[str, Any]]) -> float | None:
    """Return the fraction of a run's wall time that went into waiting for data, without what the first row measured: starting.

    Args:
        rows: of `metrics.csv`, with means over the steps since the row before.
    """
    timed = [row for row in rows if "data_wait_s" in row and "samples_per_s" in row]
    times = StepTimes()
    for before, row in pairwise(timed):
        steps, samples = row["step"] - before["step"], row["samples_seen"] - before["samples_seen"]
        times += StepTimes(steps, waited_s=steps * row["data_wait_s"], wall_s=samples / row["samples_per_s"])
    return times.waiting if times.steps else None


def seconds(value: float) -> str:
    """`12 ms`, `1.24 s`."""
    return f"{1000 * value:.{0 if value >= 0.00995 else 1}f} ms" if value < 1 else f"{value:.2f} s"


def _cores(count: int) -> str:
    return f"{count} core" if count == 1 else f"{count} cores"
