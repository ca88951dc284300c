"""Launcher of work on several devices, with one process per device: this process, processes that it starts, or ranks of torchrun or srun.

Ranks that are started here are watched, and end together, with one message and one exit code.
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

from clip_exp.devices import Devices, usable_cores
from clip_exp.errors import PREEMPTED_EXIT_CODE, ClipExpError, DistributedError, printable
from clip_exp.ranks import failure
from clip_exp.ranks.environment import free_port, local_placement, outer_placement
from clip_exp.ranks.failure import Failure, Reporter, handle_signals
from clip_exp.ranks.heartbeat import remove_heartbeats
from clip_exp.ranks.watch import Watch
from clip_exp.ranks.worker import command_line

SETTLE_S = 8.0  # time for the other ranks to end by themselves after a failure
GRACE_S = 10.0  # time between SIGTERM and SIGKILL
EXPECTED_CODES = {error.exit_code for error in ClipExpError.__subclasses__()} - {DistributedError.exit_code}
UNEXPECTED = 1  # exit code of a rank that ended with an unexpected exception
PACKAGE_PARENT = str(Path(__file__).resolve().parents[2])  # for ranks of a checkout that is not installed

Processes = list[subprocess.Popen[bytes]]


class Opened(NamedTuple):
    """Folder of the work."""

    folder: Path
    finished: bool = False  # nothing is left to do


class Ended(NamedTuple):
    """Common result of all ranks."""

    code: int  # exit code
    status: str  # finished, failed or preempted
    message: str = ""  # message to print; empty if a rank has already printed it


class Work(ABC):
    """Work of a command in a folder, on one or several devices."""

    # Function that a started process calls with the folder. It must be a module-level function, since it is imported by name.
    rank: Callable[[Path], int]
    timeout_s: int  # timeout of collectives: how long a rank waits for the slowest one

    @abstractmethod
    def open(self) -> AbstractContextManager[Opened]:
        """Check for problems, and find or create the folder, which stays locked inside the context. Called by one process."""

    @abstractmethod
    def devices(self) -> Devices:
        """Return the requested devices; called after `open`."""

    @abstractmethod
    def device_type(self) -> str:
        """Return `cpu` or `cuda`."""

    @abstractmethod
    def run(self, folder: Path) -> int:
        """Do this process's part of the work, and return the exit code. With torchrun or srun only rank 0 has called `open`."""

    @abstractmethod
    def note(self, folder: Path, status: str, **facts: Any) -> None:
        """Record that the work has failed or was preempted.

        Called for ranks that this process started, because a killed rank cannot record it. With torchrun or srun, a rank calls it for
        its own failure, or for the one that caused it.
        """


def launch_work(work: Work) -> tuple[Path, int]:
    """Open the folder of the work, and do the work; return the folder and the exit code.

    Raises:
        ClipExpError: an error of this process. Failures of ranks that it started are printed instead.
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
            work.note(
                folder, ended.status, **(failure.facts(ended.message, ended.code) if ended.status == "failed" else {})
            )
        if ended.message:
            print(printable(ended.message), file=sys.stderr, flush=True)
        return folder, ended.code


def _join(work: Work) -> tuple[Path, int]:
    """Do the work as one rank of torchrun or srun, in the folder that rank 0 opens."""
    from clip_exp.ranks import group  # imports torch

    group.start(work.device_type(), work.timeout_s)
    rank = group.rank()
    with ExitStack() as held:
        folder, finished = group.from_main(lambda: held.enter_context(work.open()))
        code = 0
        if not finished:
            held.enter_context(failure.lock_rank(folder, rank))
            group.gather_objects(rank)  # a barrier: all ranks have locks, so no rank of an earlier start is running
            group.from_main(lambda: _remove_reports(folder))
            # clip_exp's launcher does not watch these ranks, so each reports its failure to the others, and watches them.
            reporter = Reporter(
                folder, rank, lambda failed: work.note(folder, "failed", **failure.facts(failed.message, failed.code))
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
            group.stop()  # waits for the other ranks, so only after success
        return folder, code


def run_ranks(work: Callable[[Path], int], folder: Path, ranks: int, environment: dict[str, str]) -> Ended:
    """Call `work(folder)` in one process per rank. If one fails, stop the others, and return its result as that of all.

    Args:
        work: module-level function, which a rank imports by name.
        folder: folder of the work.
        ranks: number of processes.
        environment: additional environment variables of every rank.
    """
    _remove_reports(folder)
    processes = _start(command_line(work, folder), ranks, environment)
    forwarded: list[int] = []

    def forward(number: int) -> None:
        forwarded.append(number)
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    hang, failed = None, False
    with handle_signals(forward):
        try:
            hang = _wait(processes, folder)
            if hang is None:
                _wait_for_end(processes, SETTLE_S)
            codes = [process.poll() for process in processes]
            failed = any(code not in (None, 0, PREEMPTED_EXIT_CODE) for code in codes) or bool(
                failure.read_failures(folder)
            )
        finally:
            # A rank that hangs handles no signal. One that waits for a failed one has nothing to save, and would report a signal as
            # if a user had stopped it.
            at_once = hang is not None or failed
            for action in (subprocess.Popen.kill,) if at_once else (subprocess.Popen.terminate, subprocess.Popen.kill):
                for process in processes:
                    if process.poll() is None:
                        action(process)
                _wait_for_end(processes, GRACE_S)
    if hang is None:
        ended = _ended(codes, forwarded, failure.read_failures(folder))
    else:
        failure.write_log(folder, hang)
        ended = Ended(hang.code, "failed", hang.message)
    clear(folder)
    return ended


def clear(folder: Path) -> None:
    """Remove what ranks leave in the folder of their work. Call this only after all of them have ended."""
    _remove_reports(folder)
    failure.remove_rank_locks(folder)


def _remove_reports(folder: Path) -> None:
    """Remove what ranks of an earlier start have reported: failures and heartbeats."""
    failure.remove_reports(folder)
    remove_heartbeats(folder)


def _start(command: list[str], ranks: int, added: dict[str, str]) -> Processes:
    """Start the ranks in separate sessions, so that they receive Ctrl-C once, from the launcher, and not also from the terminal."""
    port = free_port()
    environment = {
        "OMP_NUM_THREADS": str(max(1, usable_cores() // ranks)),
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [PACKAGE_PARENT, os.environ.get("PYTHONPATH")])),
        **added,
    }
    placements = [local_placement(rank, ranks, port).variables() for rank in range(ranks)]
    return [subprocess.Popen(command, env={**environment, **own}, start_new_session=True) for own in placements]


def _wait(processes: Processes, folder: Path) -> Failure | None:
    """Wait until all processes have succeeded, or one has failed or reported a failure; return the failure of one that hangs."""
    watch = Watch(folder, len(processes))
    look = 0
    while True:
        codes = [process.poll() for process in processes]
        if any(code not in (None, 0) for code in codes) or all(code == 0 for code in codes):
            return None
        # Only every second, because listing the folder may be slow on a network file system.
        if look % 10 == 0 and failure.read_failures(folder):
            return None
        if look % 5 == 0 and (hang := watch.look()) is not None:
            return hang
        look += 1
        time.sleep(0.1)


def _wait_for_end(processes: Processes, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(process.poll() is None for process in processes):
        time.sleep(0.05)


def _ended(codes: list[int | None], forwarded: list[int], failures: list[Failure]) -> Ended:
    """Return the common result: that of the rank that failed first by itself, since the others only lost the connection to it.

    Args:
        codes: exit codes of the ranks; None: the rank had to be killed.
        forwarded: signals that the launcher forwarded.
        failures: reports of the ranks, earliest first.
    """
    if all(code == 0 for code in codes) and not failures:
        return Ended(0, "finished")
    harmless = (0, None, PREEMPTED_EXIT_CODE, DistributedError.exit_code, *(-number for number in forwarded))
    causes = [failed for failed in failures if failed.is_cause]
    if (forwarded or PREEMPTED_EXIT_CODE in codes) and not causes and all(code in harmless for code in codes):
        printed = PREEMPTED_EXIT_CODE in codes
        message = "" if printed else "stopped by a signal; repeat the same command to resume."
        return Ended(PREEMPTED_EXIT_CODE, "preempted", message)
    reported = {failed.rank for failed in failures}
    # A rank that a library aborted (SIGABRT) is not the cause if another rank has reported a failure.
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
    """Return a message about a rank that ended without a report."""
    who, code = f"rank {rank} of {len(codes)}", int(codes[rank] or 0)
    if code in EXPECTED_CODES:
        return f"{who} ended with exit code {code} (see its message above; it could not be saved); the others were stopped."
    if code >= 0:
        return f"{who} ended with exit code {code} and no message; the others were stopped."
    number = signal.Signals(-code)
    memory = " The system may have run out of memory: use fewer devices or workers, or smaller batches."
    return (
        f"{who} was killed by signal {number.value} ({number.name}); the others were stopped."
        f"{memory if number == signal.SIGKILL else ''} Repeat the same command to resume."
    )
