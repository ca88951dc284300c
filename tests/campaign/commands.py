"""A training command in a session of its own, the processes that it started, and signals to them."""

import os
import re
import shlex
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tests.campaign.configurations import Configuration
from tests.conftest import NOT_HANDED_ON, REPOSITORY
from tests.processes import THREADS, start_forked

ALLOWED = {"CLIP_EXP_ALLOWED_TARGETS": "tests.campaign"}


class Process(NamedTuple):
    """A living process of a command."""

    pid: int
    parent: int
    session: int


class Command:
    """`python train.py …` in a folder, by which its processes are found."""

    def __init__(
        self, folder: Path, configuration: Configuration, number: int = 0, changes: tuple[Callable[[], None], ...] = ()
    ) -> None:
        """Start the command.

        Args:
            folder: folder of the trial, with the output folder of its runs.
            configuration: the run.
            number: of the start, for the names of files with its output.
            changes: applied inside the process before the command begins.
        """
        self.folder, self.configuration = folder, configuration
        self.outputs, self.temporary = folder / "outputs", folder / "tmp"
        self.temporary.mkdir(exist_ok=True)
        self.struck: set[int] = set()  # process ids of those that were killed or stopped where they were
        self._files = [folder / f"start-{number:02d}.{name}" for name in ("out", "err")]
        environment = {key: value for key, value in os.environ.items() if key not in NOT_HANDED_ON}
        self._process = start_forked(
            REPOSITORY / "train.py",
            (*configuration.overrides, f"output_dir={self.outputs}"),
            cwd=folder,
            environment={**environment, **THREADS, **ALLOWED, "COLUMNS": "200", "TMPDIR": str(self.temporary)},
            outputs=self._files,
            before=partial(_begin, changes),
        )
        self.pid = int(self._process.pid or 0)
        with suppress(ProcessLookupError):
            while self.is_alive() and os.getsid(self.pid) != self.pid:  # until it has begun
                time.sleep(0.001)

    @property
    def code(self) -> int | None:
        """Exit code; negative: the number of the signal that ended the launcher."""
        return self._process.exitcode

    @property
    def output(self) -> str:
        return self._read(0)

    @property
    def errors(self) -> str:
        return self._read(1)

    def _read(self, file: int) -> str:
        return self._files[file].read_text(encoding="utf-8") if self._files[file].exists() else ""

    def is_alive(self) -> bool:
        return self._process.is_alive()

    def wait(self, timeout_s: float) -> int | None:
        """Wait for the end; return None if it does not come in time."""
        self._process.join(timeout_s)
        return self.code

    @property
    def run_folder(self) -> Path | None:
        """The run folder that was written to last, or None."""
        return newest_run(self.outputs)

    # -------------------------------------------------------------------------------------------------- its processes

    def processes(self) -> list[Process]:
        """Return the processes that work in the folder: launcher, ranks, workers and orphans."""
        found = (_process(int(entry.name)) for entry in os.scandir("/proc") if entry.name.isdecimal())
        return [
            process for process in found if process is not None and _working_folder(process.pid) == str(self.folder)
        ]

    def ranks(self) -> list[int]:
        """Return the process ids of the ranks that have begun, in order. A single rank is the launcher itself."""
        if self.configuration.ranks == 1:
            return [self.pid]
        folder, living = self.run_folder, {process.pid for process in self.processes()}
        ranks = []
        for rank in range(self.configuration.ranks):
            try:
                text = (folder / f".lock-rank{rank}").read_text() if folder is not None else ""
            except OSError:
                continue
            ranks += [int(pid) for pid in re.findall(r"process (\d+)", text) if int(pid) in living]
        return ranks

    def workers(self) -> list[int]:
        """Return the process ids of the data workers: forked from a rank, unlike its other helpers."""
        ranks = self.ranks()
        return [
            process.pid
            for process in self.processes()
            if process.parent in ranks and _command_line(process.pid) == _command_line(process.parent)
        ]

    def begun(self) -> list[int]:
        """Return the process ids of launcher, ranks and workers, without processes that wait to become ranks."""
        waiting = self.configuration.ranks > 1
        return [
            process.pid
            for process in self.processes()
            if process.pid == self.pid or not (waiting and process.session == self.pid)
        ]

    def send(self, pids: list[int], number: int) -> bool:
        """Send a signal to processes; return False if all of them have ended."""
        if number in (signal.SIGKILL, signal.SIGSTOP):
            self.struck.update(pids)
        sent = False
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
                sent = True
        return sent

    def kill_all(self) -> None:
        """Kill every process at once."""
        while found := self.processes():
            self.send([process.pid for process in found], signal.SIGKILL)
            self._process.join(0.05)

    def await_end_of_all(self, timeout_s: float) -> list[Process]:
        """Wait until no process is left; return those that are left."""
        deadline = time.monotonic() + timeout_s
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.01)
        return left


def describe(configuration: Configuration, outputs: Path) -> str:
    """Return the command as typed in a shell."""
    allowed = " ".join(f"{name}={value}" for name, value in ALLOWED.items())
    words = shlex.join((*configuration.overrides, f"output_dir={outputs}"))
    return f"{allowed} python train.py {words}"


def newest_run(outputs: Path) -> Path | None:
    """Return the run folder that was written to last, or None."""
    runs = []
    for path in outputs.glob("train/*/*"):
        try:
            runs.append((path.stat().st_mtime, path))
        except OSError:
            continue
    return max(runs)[1] if runs else None


def _begin(changes: tuple[Callable[[], None], ...]) -> None:
    os.setsid()  # as a shell starts a command in a group of its own
    for change in changes:
        change()


def _process(pid: int) -> Process | None:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    state, parent, _group, session = fields[0], *map(int, fields[1:4])
    return None if state == "Z" else Process(pid, parent, session)


def _working_folder(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/cwd")
    except OSError:
        return ""


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
