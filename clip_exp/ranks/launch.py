"""Doing a piece of work in one process per device: in this process, in ranks that it starts, or as a rank of torchrun or srun.

Ranks that are started here are watched, and end as one: with one message and one exit code.
"""

import itertools
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

from clip_exp.devices import Devices, usable_cores
from clip_exp.errors import PREEMPTED_EXIT_CODE, ClipExpError, DistributedError, printable
from clip_exp.ranks import failure
from clip_exp.ranks.environment import free_port, local_placement, outer_placement
from clip_exp.ranks.failure import Failure, Reporter, handle_signals
from clip_exp.ranks.worker import command_line

SETTLE_S = 8.0  # for the ranks that a failure reaches to end by themselves
GRACE_S = 10.0  # between asking the other ranks to end and ending them
EXPECTED_CODES = {error.exit_code for error in ClipExpError.__subclasses__()} - {DistributedError.exit_code}
UNEXPECTED = 1  # exit code of a rank that a bug ended
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
        """Record the end of the ranks, failed or preempted: of those that this process started, as a killed rank cannot do so
        itself; or, in a rank of torchrun or srun, the failure of this rank or of the one that caused it."""


def launch_work(work: Work) -> tuple[Path, int]:
    """Open the folder of the work and do the work in it; return the folder and the exit code.

    Raises:
        ClipExpError: of this process; a failure of a rank that it started is printed.
    """
    if outer_placement():
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
            work.note(folder, ended.status, **(_facts(ended.message, ended.code) if ended.status == "failed" else {}))
        if ended.message:
            print(printable(ended.message), file=sys.stderr, flush=True)
        return folder, ended.code


def _join(work: Work) -> tuple[Path, int]:
    """Work as one rank that torchrun or srun started, in the folder that rank 0 opens."""
    from clip_exp.ranks import group  # imports torch

    group.start(work.device_type(), work.timeout_s)
    rank = group.rank()
    with ExitStack() as held:
        folder, finished = group.from_main(lambda: held.enter_context(work.open()))
        code = 0
        if not finished:
            held.enter_context(failure.place_in(folder, rank))
            group.gather_objects(rank)  # all have their places: nothing of an earlier start reports any more
            group.from_main(lambda: failure.remove_reports(folder))
            # No launcher of ours watches the ranks: each reports to the others, and watches them.
            reporter = Reporter(
                folder, rank, lambda failed: work.note(folder, "failed", **_facts(failed.message, failed.code))
            )
            with failure.reporting_to(reporter), failure.ending_with_others(folder, rank):
                try:
                    code = work.run(folder)
                except BaseException as error:
                    reporter.report(error)
                    if not isinstance(error, ClipExpError) or isinstance(error, DistributedError):
                        raise
                    raise type(error)(f"rank {rank}: {error}") from error
        if code == 0:
            group.stop()  # which waits for the others: only where all is well
        return folder, code


def run_ranks(work: Callable[[Path], int], folder: Path, ranks: int, environment: dict[str, str]) -> Ended:
    """Call `work(folder)` in processes of their own, one per rank. When one fails the others are ended, and its end is that of all.

    Args:
        work: a function of a module, by whose name a rank imports it.
        environment: added to that of every rank.
    """
    failure.remove_reports(folder)
    processes = _start(command_line(work, folder), ranks, environment)
    forwarded: list[int] = []

    def forward(number: int) -> None:
        forwarded.append(number)
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    with handle_signals(forward):
        try:
            _wait(processes, folder)
            _wait_for_end(processes, SETTLE_S)
            codes = [process.poll() for process in processes]
        finally:
            for action in (subprocess.Popen.terminate, subprocess.Popen.kill):  # first politely
                for process in processes:
                    if process.poll() is None:
                        action(process)
                _wait_for_end(processes, GRACE_S)
    ended = _ended(codes, forwarded, failure.read_failures(folder))
    failure.remove_reports(folder)
    failure.remove_places(folder)
    return ended


def _start(command: list[str], ranks: int, added: dict[str, str]) -> Processes:
    """Start the ranks, in a session of their own: a terminal's Ctrl-C reaches them through the launcher, once."""
    port = free_port()
    environment = {
        "OMP_NUM_THREADS": str(max(1, usable_cores() // ranks)),
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [PACKAGE_PARENT, os.environ.get("PYTHONPATH")])),
        **added,
    }
    placements = [local_placement(rank, ranks, port).variables() for rank in range(ranks)]
    return [subprocess.Popen(command, env={**environment, **own}, start_new_session=True) for own in placements]


def _wait(processes: Processes, folder: Path) -> None:
    """Wait until all have ended well, or one has not, or says that it cannot."""
    for look in itertools.count():
        codes = [process.poll() for process in processes]
        if any(code not in (None, 0) for code in codes) or all(code == 0 for code in codes):
            return
        # Listing the folder may take a while on a network file system.
        if look % 10 == 0 and failure.read_failures(folder):
            return
        time.sleep(0.1)


def _wait_for_end(processes: Processes, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(process.poll() is None for process in processes):
        time.sleep(0.05)


def _ended(codes: list[int | None], forwarded: list[int], failures: list[Failure]) -> Ended:
    """Return the end of all: that of the rank that failed first by itself; the others only lost touch with it.

    A code of None is of a rank that had to be ended; `forwarded` are the signals that the launcher passed on.
    """
    if all(code == 0 for code in codes) and not failures:
        return Ended(0, "finished")
    harmless = (0, None, PREEMPTED_EXIT_CODE, DistributedError.exit_code, *(-number for number in forwarded))
    causes = [failed for failed in failures if failed.is_cause]
    if (forwarded or PREEMPTED_EXIT_CODE in codes) and not causes and all(code in harmless for code in codes):
        printed = PREEMPTED_EXIT_CODE in codes
        message = "" if printed else "stopped by a signal; the same command goes on from what was saved."
        return Ended(PREEMPTED_EXIT_CODE, "preempted", message)
    reported = {failed.rank for failed in failures}
    # What a library aborts after a failure is no cause, where a rank has reported one.
    silent = [
        rank
        for rank, code in enumerate(codes)
        if code not in (0, None, PREEMPTED_EXIT_CODE) and -code not in forwarded and rank not in reported
    ]
    killed = [rank for rank in silent if (codes[rank] or 0) < 0 and codes[rank] != -signal.SIGABRT]
    if causes and not (killed and causes[0].code == UNEXPECTED):
        return Ended(causes[0].code, "failed", causes[0].message)
    if silent:
        rank = (killed or silent)[0]
        code = codes[rank] if codes[rank] in EXPECTED_CODES else DistributedError.exit_code
        return Ended(int(code or 0), "failed", f"error: {_end_of_rank(rank, codes)}")
    return Ended(failures[0].code, "failed", failures[0].message)


def _end_of_rank(rank: int, codes: list[int | None]) -> str:
    """Return how a rank ended that has reported nothing."""
    who, code = f"rank {rank} of {len(codes)}", int(codes[rank] or 0)
    if code in EXPECTED_CODES:
        return f"{who} ended with code {code}, and its message, which is above, could not be kept; the others were stopped."
    if code >= 0:
        return f"{who} ended with code {code} and no message; the others were stopped."
    number = signal.Signals(-code)
    memory = " The system does that where memory runs out: use fewer devices or workers, or smaller batches."
    return (
        f"{who} was ended by signal {number.value} ({number.name}); the others were stopped."
        f"{memory if number == signal.SIGKILL else ''} The same command goes on from what was saved."
    )


def _facts(message: str, code: int) -> dict[str, Any]:

    return {"error": message.removeprefix("error: ").splitlines()[-20:], "exit_code": code}
