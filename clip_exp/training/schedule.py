"""Learning rate schedules as pure functions of the step, so that there is no state to save or to resume."""

import math
from collections.abc import Callable


def cosine(done: float) -> float:
    """Return half a cosine (Loshchilov and Hutter 2017): 1 at `done`=0, 0 at `done`=1."""
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
    """Return the learning rate of optimizer step `step` (from 0) over its peak: linear warm-up (s + 1) / w, then decay.

    The first step after the warm-up has the peak rate. With `final_factor` 0 this is OpenCLIP's schedule.

    Args:
        step: optimizer step, from 0.
        warmup_steps: length of the warm-up.
        total_steps: optimizer steps of the run.
        decay: function that maps the completed fraction of the decay to a factor from 1 to 0.
        final_factor: factor at the end of the decay.
        start: step at which learning starts. The rate is 0 before it, and the schedule covers the remaining steps.
    """
    if step < start:
        return 0.0
    step, total_steps = step - start, total_steps - start
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return final_factor + (1 - final_factor) * decay(done)
