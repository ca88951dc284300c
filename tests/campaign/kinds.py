"""The faults of a campaign, and what may follow each: the exit codes, and the message.

`KINDS`, at the end, is the table of them. A fault is drawn for a step of a run, and acts at a moment from there on. After it
the same command is repeated, so what it must not do is checked by `trials`: lose, litter, or change the result.
"""

import mmap
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import ClassVar, NamedTuple

from clip_exp.checkpoints.folders import checkpoints, damage, step_of
from clip_exp.runs import RunRecord
from tests.campaign import inside
from tests.campaign.commands import Command
from tests.campaign.configurations import SAVED_EVERY, STEPS, Configuration, has_key
from tests.campaign.moments import Moment, Phase, draw_moment, last_step
from tests.training.damaged_runs import contents_of, damaged_parts, flip, truncate, zero

KILLED = -signal.SIGKILL
EVERYTHING, GROUP, LAUNCHER, WORKER = "everything", "the process group", "the launcher", "a worker"
DAY_S = 24 * 3600.0


@dataclass
class Fault:
    """A fault of one start of a run."""

    moment: Moment  # when `strike` is called
    codes: ClassVar[tuple[int, ...]] = (KILLED,)  # exit codes that may follow, besides 0 of a run that ends anyway
    destroys: ClassVar[bool] = False  # damages files, of which the trial keeps a copy

    def __str__(self) -> str:
        return f"at {self.moment}"

    def changes(self, outputs: Path) -> tuple[Callable[[], None], ...]:
        """Return what changes inside the process of the command."""
        return ()

    def prepare(self, command_folder: Path) -> None:
        """Prepare the folder before the command starts."""

    def strike(self, command: Command) -> bool:
        """Do it; return False if there is nothing to do it to."""
        return True

    def has_struck(self, command: Command) -> bool:
        """Return True if the ended command met the fault."""
        return True

    def problem(self, command: Command) -> str | None:
        """Return what is wrong with how the command ended, or None."""
        code = command.code
        if code == 0 or code in self.codes:
            return None
        return f"exit code {code} instead of {' or '.join(map(str, (*self.codes, 0)))}"

    def destroy(self, run: Path, chance: Random) -> "Loss":
        """Damage the files of the run before the next start."""
        return Loss()

    def release(self) -> None:
        """Undo what `prepare` did."""


class Loss(NamedTuple):
    """What a fault destroyed on the disk."""

    what: str = ""
    good: tuple[int, ...] = ()  # steps of the checkpoints that are intact
    refused: bool = False  # the command must not begin again, since the run had, or may have had, a checkpoint
    metrics: bool = False  # rows of `metrics.csv` that a checkpoint acknowledged


def _require(text: str, command: Command) -> str | None:
    return None if text in command.errors else f"the message lacks {text!r}"


# -------------------------------------------------------------------------------------------------------------- killed


@dataclass
class Kill(Fault):
    """SIGKILL of some of a run's processes."""

    target: str  # one of the names above, or `rank <number>`

    def __str__(self) -> str:
        return f"{self.target} at {self.moment}"

    def strike(self, command: Command) -> bool:
        found = _targets(command, self.target)
        return command.send(found, signal.SIGKILL)

    def problem(self, command: Command) -> str | None:
        if self.target == WORKER and command.code == 3:
            return _require("A data loader worker was killed by a signal", command)
        if self.target.startswith("rank") and command.code == 6:
            return _require(f"{self.target} of 2 was killed by signal 9 (SIGKILL)", command)
        expected = 3 if self.target == WORKER else 6 if self.target.startswith("rank") else KILLED
        return None if command.code in (0, expected) else f"exit code {command.code} instead of {expected}"


def _targets(command: Command, target: str) -> list[int]:
    """Return the process ids of a target; that of the launcher if a rank has not begun."""
    if target == EVERYTHING:
        return [process.pid for process in command.processes()]
    if target == GROUP:
        return [process.pid for process in command.processes() if process.session == command.pid]
    if target == WORKER:
        return sorted(command.workers())[:1]
    if target.startswith("rank"):
        return command.ranks()[int(target.removeprefix("rank ")) :][:1]
    return [command.pid]


def kill_launcher(chance: Random, configuration: Configuration, step: int) -> Fault:
    return Kill(draw_moment(chance, step), LAUNCHER)


def kill_rank(chance: Random, configuration: Configuration, step: int) -> Fault | None:
    if configuration.ranks == 1:
        return None
    return Kill(draw_moment(chance, step), f"rank {chance.randrange(configuration.ranks)}")


def kill_worker(chance: Random, configuration: Configuration, step: int) -> Fault | None:
    return Kill(draw_moment(chance, step, Phase.step), WORKER) if configuration.workers else None


def kill_group(chance: Random, configuration: Configuration, step: int) -> Fault:
    return Kill(draw_moment(chance, step), chance.choice((EVERYTHING, GROUP)))


def kill_while_saving(chance: Random, configuration: Configuration, step: int) -> Fault:
    """At a random time of a save, seen from outside."""
    ranks = [f"rank {rank}" for rank in range(configuration.ranks)] if configuration.ranks > 1 else []
    saved = min(STEPS, -(-step // SAVED_EVERY) * SAVED_EVERY)
    return Kill(draw_moment(chance, saved, Phase.save), chance.choice((LAUNCHER, EVERYTHING, *ranks)))


@dataclass
class KillAtOperation(Fault):
    """A process ends itself, or the launcher, before or after one of its operations on the run folder: between phases of a save."""

    process: str
    number: int
    after_it: bool
    launcher: bool  # instead of itself

    def __str__(self) -> str:
        who = f"rank {self.process}" if self.process.isdecimal() else self.process
        victim = " kills the launcher" if self.launcher else " dies"
        return f"{who}{victim} {'after' if self.after_it else 'before'} file operation {self.number}"

    def changes(self, outputs: Path) -> tuple[Callable[[], None], ...]:
        act = inside.kill_launcher if self.launcher else inside.kill_itself
        return (inside.AtOperation(self.process, outputs, self.number, self.number, self.after_it, act),)

    def has_struck(self, command: Command) -> bool:
        return command.code != 0

    def problem(self, command: Command) -> str | None:
        expected = 6 if self.process != inside.LAUNCHER and not self.launcher else KILLED
        return None if command.code in (0, expected) else f"exit code {command.code} instead of {expected}"


def kill_between_phases(chance: Random, configuration: Configuration, step: int) -> Fault:
    process = "0" if configuration.ranks > 1 and chance.random() < 0.8 else inside.LAUNCHER
    number = chance.randint(1, 90 if process == "0" or configuration.ranks == 1 else 12)
    launcher = process == "0" and chance.random() < 0.5
    return KillAtOperation(Moment(Phase.start, step, 0), process, number, chance.random() < 0.5, launcher)


# ---------------------------------------------------------------------------------------------------------------- disk

NO_SPACE = "No space left on device"


@dataclass
class RefusedOperations(Fault):
    """Some operations on the run folder are refused as on a full disk, and later ones are not, or all from then on."""

    process: str
    first: int
    last: int
    codes = (4,)

    def __str__(self) -> str:
        last = "on" if self.last > 1000 else f"to {self.last}"
        return f"from file operation {self.first} {last}"

    def changes(self, outputs: Path) -> tuple[Callable[[], None], ...]:
        act = inside.find_no_space
        return (inside.AtOperation(self.process, outputs, self.first, self.last, False, act, inside.WRITING),)

    def has_struck(self, command: Command) -> bool:
        return NO_SPACE in command.output + command.errors

    def problem(self, command: Command) -> str | None:
        return super().problem(command) or (_require(NO_SPACE, command) if command.code == 4 else None)


def refuse_operations(chance: Random, configuration: Configuration, step: int) -> Fault:
    process = "0" if configuration.ranks > 1 else inside.LAUNCHER
    first = chance.randint(1, 60)
    last = first + chance.choice((0, 0, 3, 10, 10**6))
    return RefusedOperations(Moment(Phase.start, step, 0), process, first, last)


@dataclass
class FullDisk(Fault):
    """A mounted file system has no room for a checkpoint, or for a byte; there is room again when the command has ended."""

    room: int  # bytes that are left
    codes = (4,)
    _mounted: Path | None = field(default=None, init=False)

    def __str__(self) -> str:
        return f"{self.room:,} bytes left at {self.moment}"

    def prepare(self, command_folder: Path) -> None:
        """Move what the trial has written to a file system of its own."""
        outputs, aside = command_folder / "outputs", command_folder / "aside"
        outputs.mkdir(exist_ok=True)
        shutil.copytree(outputs, aside)
        _mount("-t", "tmpfs", "-o", "size=400m", "tmpfs", str(outputs))
        shutil.copytree(aside, outputs, dirs_exist_ok=True)
        shutil.rmtree(aside)
        self._mounted = outputs

    def strike(self, command: Command) -> bool:
        while command.is_alive():  # it fails if the run has written more meanwhile
            size = shutil.disk_usage(command.outputs).used + max(self.room, mmap.PAGESIZE)
            with suppress(subprocess.CalledProcessError):
                _mount("-o", f"remount,size={size}", str(command.outputs))
                return True
        return False

    def problem(self, command: Command) -> str | None:
        return super().problem(command) or (_require(NO_SPACE, command) if command.code == 4 else None)

    def release(self) -> None:
        """Move it back to the disk."""
        assert self._mounted is not None
        aside = self._mounted.with_name("aside")
        shutil.copytree(self._mounted, aside, symlinks=True)
        subprocess.run(["umount", "-l", str(self._mounted)], check=True)
        shutil.rmtree(self._mounted)
        aside.rename(self._mounted)


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True)


def fill_disk(chance: Random, configuration: Configuration, step: int) -> Fault | None:
    if os.geteuid() != 0:
        return None
    room = chance.choice((0, chance.randrange(2**20), chance.randrange(2**23)))
    return FullDisk(draw_moment(chance, step, Phase.start, Phase.step, Phase.step, Phase.save), room)


# -------------------------------------------------------------------------------------------------------------- damage

RUN_FILES = ("run.json", "config.yaml", "metrics.csv")


@dataclass
class Damage(Fault):
    """Everything is killed, and then files of the run are not what they were."""

    what: str  # torn, flipped or deleted
    where: str  # newest, oldest or all checkpoints, or a file of the run
    destroys = True

    def __str__(self) -> str:
        return f"{self.where} {self.what} after {self.moment}"

    def strike(self, command: Command) -> bool:
        command.kill_all()
        return True

    def has_struck(self, command: Command) -> bool:
        return command.code != 0

    def destroy(self, run: Path, chance: Random) -> Loss:
        saved = checkpoints(run)
        before = contents_of(run)
        valid = [path for path in saved if damage(path) is None]
        done = [self._act(file, chance) for file in self._files(run, saved, chance) if file.is_file()]
        hurt = damaged_parts(run, before)
        good = tuple(step_of(path) for path in valid if path.name not in hurt)
        trained = (run / "metrics.csv").exists() or (run / "checkpoints").exists()
        refused = not good and (bool(valid) or ("run.json" in hurt and trained))
        return Loss("; ".join(done), good, refused, self.where == "metrics.csv" and bool(done))

    def _files(self, run: Path, saved: list[Path], chance: Random) -> list[Path]:
        if self.where in RUN_FILES:
            return [run / self.where]
        doomed = {"newest": saved[-1:], "oldest": saved[:1], "all": saved}[self.where]
        return [chance.choice(sorted(checkpoint.iterdir())) for checkpoint in doomed if any(checkpoint.iterdir())]

    def _act(self, file: Path, chance: Random) -> str:
        if self.what == "deleted":
            file.unlink()
        else:
            change = {"torn": chance.choice((truncate, zero)), "flipped": flip}[self.what]
            file.write_bytes(change(file.read_bytes(), chance))
        return f"{file.parent.name}/{file.name} {self.what}"


def damaging(what: str) -> "Draw":
    def draw(chance: Random, configuration: Configuration, step: int) -> Fault:
        where = chance.choice(("newest", "newest", "oldest", "all", *RUN_FILES))
        return Damage(draw_moment(chance, step), what, where)

    return draw


# ------------------------------------------------------------------------------------------------------ clock and pauses


@dataclass
class ClockJump(Fault):
    """The wall clock is wrong, and jumps; then everything is killed, or nothing."""

    change: inside.Clock
    kills: bool

    def __str__(self) -> str:
        jump = f"{self.change.before_s / DAY_S:+.1f} days, then {self.change.after_s / DAY_S:+.1f}"
        return f"{jump}{f', killed at {self.moment}' if self.kills else ''}"

    def changes(self, outputs: Path) -> tuple[Callable[[], None], ...]:
        return (self.change,)

    def strike(self, command: Command) -> bool:
        if self.kills:
            command.kill_all()
        return True


def jump_clock(chance: Random, configuration: Configuration, step: int) -> Fault:
    offsets = [chance.choice((-1, 1)) * DAY_S * 10 ** chance.uniform(-3, 3) for _ in range(2)]
    kills = chance.random() < 0.8
    moment = draw_moment(chance, step, Phase.step) if kills else Moment(Phase.start, step, 0)
    return ClockJump(moment, inside.Clock(*offsets, chance.uniform(0.5, 4)), kills)


@dataclass
class Pause(Fault):
    """A process is stopped for a moment, as on a busy or suspended machine: the run must not end."""

    target: str
    seconds: float
    codes = ()

    def __str__(self) -> str:
        return f"{self.target} for {self.seconds:.1f} s at {self.moment}"

    def strike(self, command: Command) -> bool:
        found = _targets(command, self.target)
        stopped = command.send(found, signal.SIGSTOP)
        time.sleep(self.seconds)
        command.send(found, signal.SIGCONT)
        return stopped


def pause(chance: Random, configuration: Configuration, step: int) -> Fault:
    target = chance.choice((EVERYTHING, f"rank {chance.randrange(configuration.ranks)}"))
    return Pause(draw_moment(chance, step, Phase.step), target, chance.uniform(0.2, 1.5))


@dataclass
class Stop(Fault):
    """A rank or a worker is stopped and never continued: the run ends itself, and says which."""

    target: str

    def __str__(self) -> str:
        return f"{self.target} at {self.moment}"

    def strike(self, command: Command) -> bool:
        return command.send(_targets(command, self.target), signal.SIGSTOP)

    def problem(self, command: Command) -> str | None:
        expected, text = (3, "worker") if self.target == WORKER else (6, self.target)
        if command.code == expected:
            return _require(text, command)
        return None if command.code == 0 else f"exit code {command.code} instead of {expected}"


def stop_rank(chance: Random, configuration: Configuration, step: int) -> Fault | None:
    if configuration.ranks == 1:
        return None
    return Stop(draw_moment(chance, step, Phase.step), f"rank {chance.randrange(configuration.ranks)}")


def stop_worker(chance: Random, configuration: Configuration, step: int) -> Fault | None:
    return Stop(draw_moment(chance, step, Phase.step), WORKER) if configuration.workers else None


# ------------------------------------------------------------------------------------------------------------- signals

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
PREEMPTED = 143
INTERRUPTED = (130, 1)  # by Ctrl-C while the command reads its configuration, and before that by Python


@dataclass
class Signal(Fault):
    """A signal by which a scheduler or a person stops a run: it saves, and nothing is trained again."""

    target: str
    number: signal.Signals

    def __str__(self) -> str:
        return f"{self.number.name} to {self.target} at {self.moment}"

    def strike(self, command: Command) -> bool:
        found = command.begun() if self.target == EVERYTHING else _targets(command, self.target)
        return command.send(found, self.number)

    def problem(self, command: Command) -> str | None:
        code, run = command.code, command.run_folder
        if code == 0:
            return None
        record = RunRecord(run).values if run is not None else {}
        if code == PREEMPTED:
            steps = [step_of(path) for path in checkpoints(run)] if run is not None else []
            if "the same command resumes from" in command.output and last_step(run) != max(steps, default=0):
                return f"step {last_step(run)} was computed, but the last checkpoint is of step {max(steps, default=0)}"
            return None
        # Before the command has read its configuration, and when it has done its work, a signal does what it always does.
        outside = "run folder:" not in command.output or record.get("status") == "finished"
        if outside and code in (-self.number, *(INTERRUPTED if self.number == signal.SIGINT else ())):
            return None
        return f"exit code {code} instead of {PREEMPTED}"


def send_signal(chance: Random, configuration: Configuration, step: int) -> Fault:
    ranks = [f"rank {rank}" for rank in range(configuration.ranks)] if configuration.ranks > 1 else []
    target = chance.choice((LAUNCHER, EVERYTHING, *ranks))
    return Signal(draw_moment(chance, step), target, chance.choice(SIGNALS))


# --------------------------------------------------------------------------------------------------------------- table

Draw = Callable[[Random, Configuration, int], Fault | None]


class Kind(NamedTuple):
    """A kind of fault."""

    draw: Draw  # draws one for a configuration from a step on; None: the configuration cannot have it
    weight: int = 4  # how often it is drawn
    ends: bool = True  # ends the start of a run, so that another fault can follow in the same trial
    needs: str = ""  # key of the schema without which there is nothing to test

    @property
    def is_possible(self) -> bool:
        return not self.needs or has_key(self.needs)


STOPPED = "stopped"  # start of the names of kinds after which a run must end within `LIMITS`
KINDS = {
    "SIGKILL of the launcher": Kind(kill_launcher),
    "SIGKILL of a rank": Kind(kill_rank),
    "SIGKILL of a worker": Kind(kill_worker),
    "SIGKILL of the group": Kind(kill_group),
    "SIGKILL while saving": Kind(kill_while_saving, 6),
    "SIGKILL between phases": Kind(kill_between_phases, 6),
    "full disk": Kind(fill_disk),
    "refused file operations": Kind(refuse_operations, ends=False),
    "torn file": Kind(damaging("torn")),
    "flipped bit": Kind(damaging("flipped")),
    "deleted file": Kind(damaging("deleted")),
    "clock jump": Kind(jump_clock),
    "pause": Kind(pause, 2, ends=False),
    "signal": Kind(send_signal, 6),
    "stopped rank": Kind(stop_rank, 1, needs="hang_timeout_s"),
    "stopped worker": Kind(stop_worker, 1, needs="data.timeout_s"),
}
# Not drawn, but part of a configuration, since the undisturbed run has it too
NON_FINITE_STEP = "non-finite step"
