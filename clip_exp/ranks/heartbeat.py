"""Heartbeat of a rank: what its training thread does, and for how long it may be silent about it, for watchers on the same machine.

A heartbeat is a small file in the folder of the work, mapped into memory and written in place, so that a beat costs less than a
microsecond and can block nowhere. Watchers (`ranks.watch`) map the same file. They need not know what a phase is: the rank writes how
long it may be silent.
"""

import mmap
import os
import socket
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import IntEnum
from math import inf
from pathlib import Path

FILE = ".heartbeat-rank"  # name prefix of the heartbeats, one file per rank
SIZE, TEXT_AT = 1024, 128  # bytes of a file, and where its text begins
LONG = 12  # phases that may be long have this many times the usual limit


class Phase(IntEnum):
    """Part of a step or of a run, in the order in which a rank passes through them."""

    start = 0
    data = 1
    forward = 2
    backward = 3
    update = 4
    scoring = 5
    validation = 6
    saving = 7
    end = 8
    over = 9  # the rank will not beat again

    def describe(self, step: int) -> str:
        return _DESCRIPTIONS[self].format(step=f"{step:,}")


_DESCRIPTIONS = {
    Phase.start: "before the first step",
    Phase.data: "waiting for the batch of step {step}",
    Phase.forward: "in the forward pass of step {step}",
    Phase.backward: "in the backward pass of step {step}",
    Phase.update: "in the update of step {step}",
    Phase.scoring: "scoring tasks after step {step}",
    Phase.validation: "in the validation after step {step}",
    Phase.saving: "saving the checkpoint of step {step}",
    Phase.end: "after the last step",
    Phase.over: "after its end",
}


class Layout:
    """Fields of a heartbeat in memory. Every number is one aligned word, which is read and written as a whole."""

    BEATS, PID, HOST, PHASE, STEP, BY_DATA, VERDICT, LENGTH = range(8)  # words
    LIMIT = 8  # a float

    def __init__(self, memory: mmap.mmap) -> None:
        view = memoryview(memory)
        self.words = view[:TEXT_AT].cast("q")
        self.floats = view[:TEXT_AT].cast("d")
        self.text = view[TEXT_AT:]


def write_text(memory: memoryview, text: str) -> int:
    """Write a text to the start of a memory, as much as fits; return its length in bytes."""
    data = text.encode(errors="backslashreplace")[: len(memory)]  # UTF-8 has no lone surrogates, but a name may
    memory[: len(data)] = data
    return len(data)


def read_text(memory: memoryview, length: int) -> str:
    """Return a text that `write_text` has written."""
    return bytes(memory[:length]).decode(errors="replace")


class Heartbeat:
    """Heartbeat of this process. Only its training thread may beat: another thread would hide that it hangs.

    Args:
        folder: folder of the work.
        rank: rank of this process.
        hang_timeout_s: default of the longest silence.
        read_timeout_s: longest time to read a row; None: the limit of the phase.
    """

    def __init__(self, folder: Path, rank: int, hang_timeout_s: float, read_timeout_s: float | None) -> None:
        self.path = folder / f"{FILE}{rank}"
        self.hang_timeout_s, self.read_timeout_s = hang_timeout_s, read_timeout_s
        # Until the first step is over, nothing is known about how long a step takes.
        self.limits: dict[Phase, float] = dict.fromkeys(Phase, LONG * hang_timeout_s) | {Phase.over: inf}
        self._fields = fields = Layout(_create(self.path))
        fields.words[Layout.PID] = os.getpid()
        fields.words[Layout.HOST] = this_host()
        self.enter(Phase.start, 0)

    def enter(self, phase: Phase, step: int | None = None) -> None:
        """Beat, and begin a phase.

        Args:
            phase: the phase.
            step: number of the step, counted from 1; None: as before.
        """
        words = self._fields.words
        # First of all: whoever reads one of the new values and then the count sees that the rank has just beaten.
        words[Layout.BEATS] += 1
        if step is not None:
            words[Layout.STEP] = step
        words[Layout.PHASE] = phase
        self._limit_by_phase()

    def beat(self) -> None:
        """Report progress within the phase."""
        self._fields.words[Layout.BEATS] += 1

    def reading(self, name: str) -> None:
        """Beat, and report which row is being read; an empty name: none any more."""
        fields = self._fields
        fields.words[Layout.BEATS] += 1
        if not name:
            self._limit_by_phase()
            return
        fields.words[Layout.LENGTH] = write_text(fields.text, name)
        if self.read_timeout_s is not None:
            fields.floats[Layout.LIMIT] = self.read_timeout_s
            fields.words[Layout.BY_DATA] = 1

    @property
    def verdict(self) -> int:
        """Exit code with which a watcher asks this process to end; 0: none."""
        return self._fields.words[Layout.VERDICT]

    def close(self) -> None:
        self.enter(Phase.over)
        with suppress(OSError):
            self.path.unlink(missing_ok=True)

    def _limit_by_phase(self) -> None:
        words = self._fields.words
        words[Layout.LENGTH] = words[Layout.BY_DATA] = 0
        self._fields.floats[Layout.LIMIT] = self.limits[Phase(words[Layout.PHASE])]


def this_host() -> int:
    """Return a number for this machine: a folder may be shared with ranks of others, whose memory is not visible here."""
    return zlib.crc32(socket.gethostname().encode())


def remove_heartbeats(folder: Path) -> None:
    """Remove the heartbeats of ranks that were killed. Call this only after all ranks have ended."""
    for path in folder.glob(f"{FILE}*"):
        path.unlink(missing_ok=True)


def _create(path: Path) -> mmap.mmap:
    """Create a heartbeat and map it; without room for it on disk, map memory that no watcher sees."""
    temporary = path.with_name(f"{path.name}.new")
    try:
        # Written, not truncated to its size: a hole that a full disk cannot fill would end the process at its first beat.
        temporary.write_bytes(bytes(SIZE))
        with temporary.open("r+b") as file:
            memory = mmap.mmap(file.fileno(), SIZE)
        temporary.replace(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        return mmap.mmap(-1, SIZE)
    return memory


# ------------------------------------------------------------------------------- the heartbeat of this process, if any

_current: Heartbeat | None = None


@contextmanager
def beating(heartbeat: Heartbeat) -> Iterator[None]:
    """Use this heartbeat for the functions of this module inside the context, and close it at the end."""
    global _current
    _current = heartbeat
    try:
        yield
    finally:
        _current = None
        heartbeat.close()


def forget() -> None:
    """Leave the heartbeat to the parent process; called in a process that was forked from a rank."""
    global _current
    _current = None


def enter(phase: Phase, step: int | None = None) -> None:
    """Begin a phase if this process has a heartbeat; see `Heartbeat.enter`."""
    if _current is not None:
        _current.enter(phase, step)


def beat() -> None:
    """Report progress if this process has a heartbeat."""
    if _current is not None:
        _current.beat()


def reading(name: str) -> None:
    """Report which row is being read if this process has a heartbeat; see `Heartbeat.reading`."""
    if _current is not None:
        _current.reading(name)


def limit(limits: dict[Phase, float]) -> None:
    """Change the limits of phases, from the next one that is entered, if this process has a heartbeat."""
    if _current is not None:
        _current.limits.update(limits)
