"""One run with several faults: the same command is repeated until the run ends, and what must hold is checked after each start."""

import re
import shutil
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random

from clip_exp.checkpoints.folders import checkpoints, damage, step_of
from clip_exp.runs import LAST_CHECKPOINT
from clip_exp.storage import read_json_object
from tests.campaign.commands import Command, describe, newest_run
from tests.campaign.configurations import (
    CONFIGURATIONS,
    NON_FINITE_NEEDS,
    NON_FINITE_STEPS,
    STEPS,
    Configuration,
    has_key,
)
from tests.campaign.kinds import KINDS, NON_FINITE_STEP, STOPPED, Fault
from tests.campaign.moments import await_moment
from tests.campaign.references import Reference, differences

COMMAND_S = 150  # a command that runs longer hangs
REPEAT = "repeat the command to write its report"  # in the message of a run that trained, and then found no space for its report
ORPHANS_S = 20  # time for the workers of a killed rank to notice that it has gone


@dataclass(frozen=True)
class Trial:
    """A run, and the faults of its starts in order."""

    number: int
    configuration: Configuration
    faults: list[tuple[str, Fault]]  # with their kinds


def draw_trial(seed: int, number: int, kinds: tuple[str, ...]) -> Trial:
    """Draw a trial, which depends on its arguments alone."""
    chance = Random(f"{seed}/{number}")
    non_finite = has_key(NON_FINITE_NEEDS) and NON_FINITE_STEP in kinds
    configurations = [each for each in CONFIGURATIONS if non_finite or not each.non_finite]
    limited = any(name.startswith(STOPPED) for name in kinds)
    configuration = replace(configurations[number % len(configurations)], limited=limited)
    steps = sorted(chance.sample(range(1, STEPS + 1), chance.randint(3, 7)))
    possible = {name: KINDS[name] for name in kinds if name in KINDS and KINDS[name].is_possible}
    faults: list[tuple[str, Fault]] = []
    while len(faults) < len(steps):
        last = len(faults) == len(steps) - 1
        drawn = {name: kind for name, kind in possible.items() if kind.ends or last} or possible
        (name,) = chance.choices(list(drawn), [kind.weight * (1 if kind.ends else 5) for kind in drawn.values()])
        fault = possible[name].draw(chance, configuration, steps[len(faults)])
        faults += [] if fault is None else [(name, fault)]
    return Trial(number, configuration, faults)


@dataclass
class Result:
    """What came of a fault."""

    trial: int
    configuration: str
    kind: str
    fault: str
    outcome: str  # such as `exit 143`, or why it did not strike
    struck: bool
    seconds: float


class Deviation(Exception):
    """What a campaign looks for: something was lost, changed, left behind or said wrongly."""


@dataclass
class Run:
    """The progress of a trial."""

    trial: Trial
    reference: Reference
    folder: Path
    chance: Random
    results: list[Result] = field(default_factory=list)
    acknowledged: int = 0  # step of the last checkpoint that `run.json` recorded and no fault destroyed
    recorded_before: int | None = None  # step that `run.json` still names, and whose checkpoint a fault destroyed
    metrics_after: int = 0  # up to this step rows of `metrics.csv` were destroyed
    starts: int = 0
    # Of all processes seen that could tidy up. A worker that is killed where it is may leave the batch in shared memory whose file
    # it is just creating; torch removes the name a moment later.
    pids: set[int] = field(default_factory=set)

    @property
    def outputs(self) -> Path:
        return self.folder / "outputs"


def run_trial(trial: Trial, seed: int, reference: Reference, folder: Path) -> tuple[list[Result], str]:
    """Run a trial; return what came of its faults, and a text about its deviation, empty if there is none.

    The folder is removed unless there is a deviation.
    """
    folder.mkdir(parents=True)
    run = Run(trial, reference, folder, Random(f"{seed}/{trial.number}/damage"))
    try:
        ended = any(_start(run, kind, fault) for kind, fault in trial.faults)
        if not ended and (code := _undisturbed(run).code) != 0:
            raise Deviation(f"exit code {code} without a fault")
        _check_end(run)
    except Deviation as deviation:
        return run.results, _explained(run, str(deviation))
    if trial.configuration.non_finite:
        name = trial.configuration.name
        run.results += [
            Result(trial.number, name, NON_FINITE_STEP, f"step {step}", "equal to the reference", True, 0.0)
            for step in NON_FINITE_STEPS
        ]
    shutil.rmtree(folder)
    return run.results, ""


def _start(run: Run, kind: str, fault: Fault) -> bool:
    """Start the command with a fault; return True if the run has ended, and the command need not be repeated."""
    began_s = time.monotonic()
    fault.prepare(run.folder)
    command = Command(run.folder, run.trial.configuration, run.starts, fault.changes(run.outputs))
    run.starts += 1
    came = await_moment(fault.moment, command, run.reference.pace)
    run.pids |= {process.pid for process in command.processes()}
    came = came and fault.strike(command)
    code = _await_end(command)
    run.pids -= command.struck
    struck = came and fault.has_struck(command)
    outcome = f"exit {code}" if struck else f"did not strike, exit {code}"
    seconds = time.monotonic() - began_s
    result = Result(run.trial.number, run.trial.configuration.name, kind, str(fault), outcome, struck, seconds)
    run.results.append(result)
    fault.release()
    if (problem := fault.problem(command)) is not None:
        raise Deviation(problem)
    if not came and code != 0:
        raise Deviation(f"exit code {code} without a fault")
    _check_start(run, command)
    folder = newest_run(run.outputs)
    # A run that was killed after its report is complete, and nothing reads its files again.
    if struck and fault.destroys and folder is not None and not (folder / "report.html").exists():
        result.fault += f" ({_destroy(run, fault, folder)})"
    return code == 0 and REPEAT not in command.errors


def _undisturbed(run: Run) -> Command:
    command = Command(run.folder, run.trial.configuration, run.starts)
    run.starts += 1
    _await_end(command)
    _check_start(run, command)
    return command


def _await_end(command: Command) -> int:
    code = command.wait(COMMAND_S)
    if code is None:
        command.kill_all()
        raise Deviation(f"the command still ran after {COMMAND_S} s")
    if left := command.await_end_of_all(ORPHANS_S):
        command.kill_all()
        raise Deviation(f"processes were left {ORPHANS_S} s after the end of the command: {left}")
    return code


def _check_start(run: Run, command: Command) -> None:
    """Check what must hold after every end of the command."""
    if _has_traceback(command.errors):
        raise Deviation("a traceback was printed")
    if (resumed := _resumed_step(command.output)) is not None and resumed < run.acknowledged:
        raise Deviation(f"resumed from step {resumed}, although step {run.acknowledged} was acknowledged")
    folder = newest_run(run.outputs)
    if folder is None:
        return
    try:
        recorded = _recorded_step(folder)
    except ValueError as error:
        if run.recorded_before is None:
            raise Deviation(f"run.json is damaged: {error}") from error
        return  # by a fault, and this start was killed before it repaired it
    if recorded != run.recorded_before:
        run.acknowledged, run.recorded_before = max(run.acknowledged, recorded), None
    valid = _valid_steps(folder)
    if run.acknowledged > max(valid, default=0):
        raise Deviation(f"step {run.acknowledged} was acknowledged, but the valid checkpoints are of steps {valid}")


def _has_traceback(errors: str) -> bool:
    """Return True if a traceback was printed, but for Python's of Ctrl-C while it imports, and two of libraries.

    One of these is of a worker that sends a batch to a rank just when that is killed, the other of a loader that is removed just
    when its worker is.
    """
    if errors.endswith("KeyboardInterrupt\n"):
        return False
    before, *tracebacks = errors.split("Traceback (most recent call last):")
    parts = zip((before, *tracebacks), tracebacks, strict=False)
    return any(
        "Exception ignored in" not in previous[-200:] and "resource_sharer.py" not in this for previous, this in parts
    )


def _valid_steps(folder: Path) -> list[int]:
    return [step_of(path) for path in checkpoints(folder) if damage(path) is None]


def _recorded_step(folder: Path) -> int:
    try:
        return read_json_object(folder / "run.json")[LAST_CHECKPOINT] or 0
    except FileNotFoundError:
        return 0  # not written yet


def _resumed_step(output: str) -> int | None:
    """Return the step from which a start trained: that of its checkpoint, 0 for the beginning; None: it did not get so far."""
    resumed = [line for line in output.splitlines() if line.startswith("resuming from ")]
    if resumed:
        return int(resumed[-1].rpartition("(step ")[2].rstrip(")").replace(",", ""))
    return 0 if f"step 1/{STEPS} " in output else None


def _destroy(run: Run, fault: Fault, folder: Path) -> str:
    """Damage the run, and expect an older checkpoint; where none is left, the command must refuse to begin again. Return what was done.

    A person then restores the run from a copy.
    """
    backup = run.folder / "backup"
    shutil.copytree(folder, backup)
    run.recorded_before = _recorded_step(folder)
    resumable = max(_valid_steps(folder), default=0)  # it may be acknowledged for the second time, after damage
    loss = fault.destroy(folder, run.chance)
    if loss.metrics:
        run.metrics_after = max(run.metrics_after, run.acknowledged, resumable)
    if loss.refused:
        refused = Command(run.folder, run.trial.configuration, run.starts)
        run.starts += 1
        code = _await_end(refused)
        if code != 4 or any(text not in refused.errors for text in ("has no usable checkpoint", "resume=never")):
            raise Deviation(
                f"exit code {code} instead of 4 after all checkpoints were damaged ({loss.what}): {refused.errors}"
            )
        shutil.rmtree(folder)
        shutil.copytree(backup, folder)
    else:
        run.acknowledged = min(run.acknowledged, max(loss.good, default=0))
    shutil.rmtree(backup)
    return loss.what


def _check_end(run: Run) -> None:
    """Check the finished run: it is the only one, equal to the undisturbed one, and nothing is left of the faults."""
    saved = [folder for folder in run.outputs.glob("train/*/*") if list(folder.glob("checkpoints/step-*"))]
    if len(saved) != 1:
        raise Deviation(f"{len(saved)} runs have checkpoints: {saved}")
    (folder,) = saved
    if missing := [name for name in ("summary.json", "report.html") if not (folder / name).is_file()]:
        raise Deviation(f"the finished run lacks {missing}")
    record = read_json_object(folder / "run.json")
    if (record["status"], record[LAST_CHECKPOINT]) != ("finished", STEPS):
        raise Deviation(f"run.json has status {record['status']} and last checkpoint {record[LAST_CHECKPOINT]}")
    if different := differences(folder, run.reference.folder, run.metrics_after):
        raise Deviation("the end differs from that of the undisturbed run:\n  " + "\n  ".join(different))
    if litter := _litter(run):
        raise Deviation(f"litter was left: {litter}")


def _litter(run: Run) -> list[str]:
    """Return temporary files that outlived the run: in its folders, in TMPDIR and in shared memory."""
    names = (".writing-", ".lock-rank", ".error-rank", ".heartbeat-rank")
    found = [path for path in run.outputs.rglob(".*") if path.name.startswith(names) and not _never_began(path.parent)]
    found += (run.folder / "tmp").iterdir()
    found += [
        path
        for path in Path("/dev/shm").iterdir()
        if any(part.isdecimal() and int(part) in run.pids for part in re.split(r"\W|_", path.name))
    ]
    return [str(path) for path in found]


def _never_began(folder: Path) -> bool:
    """Return True for the folder of a start that was killed before it wrote `run.json`: the next one cannot recognize it."""
    return folder.parents[1].name == "train" and not (folder / "run.json").exists()


def _explained(run: Run, deviation: str) -> str:
    """Return what is needed to look at a deviation, which `deviation.txt` in the folder has too."""
    faults = [
        f"  start {number}: {result.kind}: {result.fault}: {result.outcome}"
        for number, result in enumerate(run.results)
    ]
    lines = [
        f"trial {run.trial.number}, {run.trial.configuration.name}: {deviation}",
        *faults,
        f"folder (output of each start: start-*.out, start-*.err): {run.folder}",
        f"undisturbed run: {run.reference.folder}",
        f"command: {describe(run.trial.configuration, run.outputs)}",
    ]
    text = "\n".join(lines)
    (run.folder / "deviation.txt").write_text(text + "\n", encoding="utf-8")
    return text
