"""Learning rate over its peak, as a pure function of the step: nothing to save, nothing to resume."""

import math
from collections.abc import Callable


def cosine(done: float) -> float:
    """Half a cosine (Loshchilov and Hutter 2017): 1 at `done`=0, 0 at `done`=1."""
    return 0.5 * (1 + math.cos(math.pi * done))


def linear(done: float) -> float:
    return 1 - done


def constant(done: float) -> float:
    return 1.0


def factor(
    step: int,
    *,
    warmup_steps: int,
    total_steps: int,
    decay: Callable[[float], float],
    final_factor: float,
    start: int = 0,
) -> float:
    """The rate of optimizer step `step` (from 0) over the peak: linear warm-up (s + 1) / w, then `decay` to `final_factor`.

    The first step after the warm-up has the peak rate. Without `final_factor` this is OpenCLIP's schedule. Before `start` the
    rate is 0, and the schedule takes the steps that remain.
    """
    if step < start:
        return 0.0
    step, total_steps = step - start, total_steps - start
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return final_factor + (1 - final_factor) * decay(done)
