"""When a fault strikes: by the time since the start, by a step, by a save, or by the end of the run."""

import time
from enum import StrEnum
from pathlib import Path
from random import Random
from typing import NamedTuple

from clip_exp.checkpoints.folders import folder_of
from tests.campaign.commands import Command
from tests.campaign.configurations import SAVED_EVERY, STEPS

POLL_S = 0.001
SAVE_S = 0.03  # about as long as a save takes


class Phase(StrEnum):
    """What a run is doing when a fault strikes."""

    start = "start-up"
    step = "step"
    save = "save of step"
    end = "end"


class Pace(NamedTuple):
    """Times of an undisturbed run, in seconds."""

    start_s: float = 2.0  # from the command to the first step
    step_s: float = 0.05
    end_s: float = 0.3  # from the last checkpoint to the end of the command


class Moment(NamedTuple):
    """Phase of a run, and a random time in it."""

    phase: Phase
    step: int  # completed optimizer steps
    fraction: float  # of the duration of the start-up, of a step, of a save or of the end

    def __str__(self) -> str:
        step = f" {self.step}" if self.phase in (Phase.step, Phase.save) else ""
        return f"{self.phase}{step} + {self.fraction:.2f}"


def draw_moment(chance: Random, step: int, *phases: Phase) -> Moment:
    """Draw one of the phases, or of all but saves, and a time in it."""
    phase = chance.choice(phases or (Phase.start, Phase.step, Phase.step, Phase.step))
    if not phases and step > STEPS - SAVED_EVERY and chance.random() < 0.5:
        phase = Phase.end
    # Steps that are validated and saved take longer.
    return Moment(phase, step, chance.uniform(0, 4 if phase is Phase.step else 1))


def await_moment(moment: Moment, command: Command, pace: Pace) -> bool:
    """Wait for the moment; return False if the command ended before."""
    step = max(moment.step, last_step(command.run_folder) + 1)  # of rows that an earlier start left
    length_s = {Phase.start: pace.start_s, Phase.step: pace.step_s, Phase.save: SAVE_S, Phase.end: pace.end_s}
    while not _has_come(moment.phase, command.run_folder, step):
        if not command.is_alive():
            return False
        time.sleep(POLL_S)
    deadline = time.monotonic() + moment.fraction * length_s[moment.phase]
    while command.is_alive() and (left_s := deadline - time.monotonic()) > 0:
        time.sleep(min(left_s, 0.01))
    return command.is_alive()


def _has_come(phase: Phase, run_folder: Path | None, step: int) -> bool:
    if phase is Phase.start:
        return True
    if run_folder is None:
        return False
    if phase is Phase.step:
        return last_step(run_folder) >= min(step, STEPS)
    if phase is Phase.save:
        writing = (run_folder / "checkpoints").glob(".writing-step-*")
        return any(int(path.name.split("-")[2]) >= min(step, STEPS) for path in writing)
    return folder_of(run_folder, STEPS).is_dir()


def last_step(run_folder: Path | None) -> int:
    """Return the step of the last complete row of `metrics.csv`, or 0."""
    try:
        lines = (run_folder / "metrics.csv").read_bytes().split(b"\n") if run_folder is not None else []
        return int(lines[-2].split(b",")[0])
    except (OSError, ValueError, IndexError):
        return 0
