"""Doing a piece of work in one process per device: in this process, in ranks that it starts, or as a rank of torchrun or srun.

Ranks that are started here are watched, and end as one: with one message and one exit code.
"""

import os
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from clip_exp.devices import Devices
from clip_exp.errors import (
    PREEMPTED_EXIT_CODE,
    CheckpointError,
    ClipExpError,
    ConfigError,
    DataError,
    DistributedError,
    NumericError,
    printable,
)
from clip_exp.ranks.environment import free_port, outer_ranks, rank_environment
from clip_exp.ranks.signals import handle_signals
from clip_exp.ranks.worker import command_line, error_file

SETTLE_S = 8.0  # for the ranks that a failure reaches to end by themselves
GRACE_S = 20.0  # between asking the other ranks to end and ending them
EXPECTED_CODES = {error.exit_code for error in (ConfigError, DataError, CheckpointError, NumericError)}
PACKAGE_PARENT = str(Path(__file__).resolve().parents[2])  # a checkout need not be installed

Processes = list[subprocess.Popen[bytes]]


class Opened(NamedTuple):
    """The folder of a piece of work."""

    folder: Path
    finished: bool = False  # there is nothing left to do in it


class Ended(NamedTuple):
    """The end of the ranks of a piece of work, as one."""

    code: int
    status: str  # finished, failed or preempted
    message: str = ""  # to be printed; empty where a rank has printed what there is to say

    def facts(self) -> dict[str, Any]:
        """Return what a record of the work says about the end, besides its status."""
        if self.status != "failed":
            return {}
        return {"error": self.message.removeprefix("error: ").splitlines()[-20:], "exit_code": self.code}


class Work(ABC):
    """What a command does in a folder, on one or several devices."""

    # What a process that `launch_work` starts does in the folder: a function of a module, by whose name the process imports it.
    rank: Callable[[Path], int]
    timeout_s: int  # of a collective: how long a rank waits for the slowest

    @abstractmethod
    def open(self) -> AbstractContextManager[Opened]:
        """Check what can be wrong, and find or make the folder, which is held while the context lasts. One process calls."""

    @abstractmethod
    def devices(self) -> Devices:
        """Return the requested devices; called after `open`."""

    @abstractmethod
    def device_type(self) -> str:
        """Return `cpu` or `cuda`."""

    @abstractmethod
    def run(self, folder: Path) -> int:
        """Do this process's part of the work and return the exit code. Under torchrun or srun only rank 0 has called `open`."""

    @abstractmethod
    def note(self, folder: Path, status: str, **facts: Any) -> None:
        """Record the end of the ranks that this process started, failed or preempted: a killed rank cannot do so itself."""


def launch_work(work: Work) -> tuple[Path, int]:
    """Open the folder of the work and do the work in it; return the folder and the exit code.

    Raises:
        ClipExpError: of this process; a failure of a rank that it started is printed.
    """
    if outer_ranks():
        return _join(work)
    with work.open() as (folder, finished):
        if finished:
            return folder, 0
        devices = work.devices()
        count = devices.count()
        if count == 1 and devices.gpus is None:
            return folder, work.run(folder)
        ended = run_ranks(work.rank, folder, count, devices.environment())
        if ended.status != "finished":
            work.note(folder, ended.status, **ended.facts())
        if ended.message:
            print(printable(ended.message), file=sys.stderr, flush=True)
        return folder, ended.code


def _join(work: Work) -> tuple[Path, int]:
    """Work as one rank that torchrun or srun started, in the folder that rank 0 opens."""
    from clip_exp.ranks import group  # imports torch

    group.start(work.device_type(), work.timeout_s)
    rank = group.rank()
    try:
        with ExitStack() as held:
            folder, finished = group.from_main(lambda: held.enter_context(work.open()))
            if finished:
                return folder, 0
            try:
                return folder, work.run(folder)
            except DistributedError:
                raise
            except ClipExpError as error:
                raise type(error)(f"rank {rank}: {error}") from error
    finally:
        group.stop()


def run_ranks(work: Callable[[Path], int], folder: Path, ranks: int, environment: dict[str, str]) -> Ended:
    """Call `work(folder)` in processes of their own, one per rank. When one fails the others are ended, and its end is that of all.

    Args:
        work: a function of a module, by whose name a rank imports it.
        environment: added to that of every rank.
    """
    for rank in range(ranks):
        error_file(folder, rank).unlink(missing_ok=True)
    processes = _start(command_line(work, folder), ranks, environment)
    forwarded: list[int] = []

    def forward(number: int) -> None:
        forwarded.append(number)
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    with handle_signals(forward):
        try:
            _wait(processes)
            codes = _settle(processes)
        finally:
            _end(processes)
    return _ended(codes, forwarded, _collect_messages(folder, ranks))


def _start(command: list[str], ranks: int, added: dict[str, str]) -> Processes:
    """Start the ranks, in a session of their own: a terminal's Ctrl-C reaches them through the launcher, once."""
    port = free_port()
    environment = {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks)),
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [PACKAGE_PARENT, os.environ.get("PYTHONPATH")])),
        **added,
    }
    return [
        subprocess.Popen(command, env={**environment, **rank_environment(rank, ranks, port)}, start_new_session=True)
        for rank in range(ranks)
    ]


def _wait(processes: Processes) -> None:
    """Wait until all have ended well, or one has not."""
    while True:
        codes = [process.poll() for process in processes]
        if any(code not in (None, 0) for code in codes) or all(code == 0 for code in codes):
            return
        time.sleep(0.1)


def _settle(processes: Processes) -> list[int | None]:
    """Return the exit codes, after a moment in which the ranks that a failure reaches end by themselves; None: still running."""
    deadline = time.monotonic() + SETTLE_S
    while time.monotonic() < deadline and any(process.poll() is None for process in processes):
        time.sleep(0.05)
    return [process.poll() for process in processes]


def _end(processes: Processes) -> None:
    """End what is still running: first politely."""
    for action in (subprocess.Popen.terminate, subprocess.Popen.kill):
        for process in processes:
            if process.poll() is None:
                action(process)
        deadline = time.monotonic() + GRACE_S
        while time.monotonic() < deadline and any(process.poll() is None for process in processes):
            time.sleep(0.05)


def _ended(codes: list[int | None], forwarded: list[int], messages: dict[int, str]) -> Ended:
    """Return the end of all: that of the rank that failed first in cause, with its message; the others only lost touch with it.

    Args:
        codes: of the ranks; None: had to be ended.
        forwarded: signals that the launcher passed on.
        messages: of the ranks that left one.
    """
    if all(code == 0 for code in codes):
        return Ended(0, "finished")
    harmless = (0, None, PREEMPTED_EXIT_CODE, DistributedError.exit_code, *(-number for number in forwarded))
    if (forwarded or PREEMPTED_EXIT_CODE in codes) and all(code in harmless for code in codes):
        printed = PREEMPTED_EXIT_CODE in codes
        message = "" if printed else "stopped by a signal; the same command goes on from what was saved."
        return Ended(PREEMPTED_EXIT_CODE, "preempted", message)
    expected = [rank for rank in messages if codes[rank] in EXPECTED_CODES]
    killed = [rank for rank, code in enumerate(codes) if code is not None and code < 0 and -code not in forwarded]
    if not expected and (killed or not messages):
        message = _end_of_rank(killed[0], codes) if killed else _end_without_message(codes)
        return Ended(DistributedError.exit_code, "failed", f"error: {message}")
    causes = [rank for rank in messages if codes[rank] != DistributedError.exit_code]
    cause = (*expected, *causes, *messages)[0]
    return Ended(codes[cause] or 1, "failed", messages[cause])


def _collect_messages(folder: Path, ranks: int) -> dict[int, str]:
    """Take the messages that failing ranks left for the launcher, by rank."""
    messages = {}
    for rank in range(ranks):
        path = error_file(folder, rank)
        if path.is_file():
            messages[rank] = path.read_text(encoding="utf-8")
            path.unlink()
    return messages


def _end_of_rank(rank: int, codes: list[int | None]) -> str:
    number = signal.Signals(-int(codes[rank] or 0))
    memory = (
        " The system does that where memory runs out: use fewer devices or workers, or smaller batches."
        if number == signal.SIGKILL
        else ""
    )
    return (
        f"rank {rank} of {len(codes)} was ended by signal {number.value} ({number.name}); the others were stopped.{memory} "
        "The same command goes on from what was saved."
    )


def _end_without_message(codes: list[int | None]) -> str:
    rank, code = next((rank, code) for rank, code in enumerate(codes) if code)
    return f"rank {rank} of {len(codes)} ended with code {code} and no message; the others were stopped."
