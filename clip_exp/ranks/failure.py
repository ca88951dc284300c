"""Failures of ranks: each rank reports its failure before doing anything that may block, and is then ended after a timeout.

After an exception many things may block: a GPU that waits for a collective that other ranks never join, the destruction of the group,
or the server of a logger. So a failing rank first writes a report to the folder of the work, where the launcher and the other ranks
find it. A timer then ends the process, wherever it is stuck.
"""

import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, NoReturn

import clip_exp.storage as storage
from clip_exp.errors import PREEMPTED_EXIT_CODE, ClipExpError, DistributedError, printable
from clip_exp.secrets import redact

END_S = 10.0  # time for a rank to end by itself after it reported a failure, or found that of another rank
# Interval of looking for reports of other ranks. Each look lists a folder that hundreds of ranks may share.
POLL_S = 5.0
CAUSE_S = 3.0  # time to wait for the report of the rank that failed first, if this rank only lost the connection to it
CHILD_S = 2.0  # time for a killed child process to end
PREFIX = ".error-rank"  # name prefix of the reports, one file per rank
PLACE = ".lock-rank"  # name prefix of the locks, one file per rank
PLACE_S = 10.0  # time to wait until a rank of an earlier start has ended
LOG = "errors.log"  # messages of all ranks, kept after the run


class Failure(NamedTuple):
    """Failure of a rank."""

    rank: int
    code: int  # exit code
    message: str
    time_ns: int  # time of the report

    @property
    def is_cause(self) -> bool:
        """True if the rank failed by itself, and did not only lose the connection to another one."""
        return self.code != DistributedError.exit_code


@dataclass
class Reporter:
    """Reporter of the failure of this process, one of several ranks. Only the first report counts."""

    folder: Path  # folder of the work, shared by all ranks
    rank: int
    note: Callable[[Failure], None] | None = (
        None  # called with the failure to record: this rank's, or the one that caused it
    )
    failure: Failure | None = field(default=None, init=False)

    def report(self, error: BaseException) -> Failure:
        """Write the report of a failure, and start the timer that ends this process."""
        if self.failure is not None:
            return self.failure
        if threading.current_thread() is threading.main_thread():
            # torch raises an exception about a killed worker wherever the training thread is, also in the middle of the report.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self.failure = failure = describe(self.rank, error)

        def end() -> None:
            time.sleep(END_S)
            if self.note is not None:  # there is no launcher to print it, and this process is stuck before printing it
                print(printable(failure.message), file=sys.stderr, flush=True)
            os._exit(failure.code)

        threading.Thread(target=end, daemon=True).start()
        write_report(self.folder, failure)
        if self.note is not None:
            with suppress(OSError):  # a full disk must not hide the failure
                self.note(failure if failure.is_cause else await_cause(self.folder) or failure)
        return failure


@contextmanager
def lock_rank(folder: Path, rank: int) -> Iterator[None]:
    """Hold the lock of a rank in a folder; raise a DistributedError if the same rank of an earlier start does not release it."""
    with ExitStack() as held:
        try:
            # A file system without locks was already reported when the folder was opened.
            lock = storage.lock(folder / f"{PLACE}{rank}", wait_s=PLACE_S, on_no_locks=lambda *_: None, remove=True)
            held.enter_context(lock)
        except storage.InUse as error:
            raise DistributedError(
                f"rank {rank} of an earlier start is still running in {folder} ({error.owner}): wait for it, or end it."
            ) from None
        except OSError:
            pass  # for example a full disk, which the work itself will report
        yield


_reporter: Reporter | None = None  # reporter of this process


@contextmanager
def reporting_to(reporter: Reporter) -> Iterator[None]:
    """Use this reporter for calls of `report` inside the context."""
    global _reporter
    _reporter = reporter
    try:
        yield
    finally:
        _reporter = None


def report(error: BaseException) -> None:
    """Report the failure of this process if it is one of several ranks. Call it before anything that may block."""
    if _reporter is not None:
        _reporter.report(error)


def describe(rank: int, error: BaseException) -> Failure:
    """Return the failure for an error, with the text of an expected error, or the traceback of any other."""
    if isinstance(error, ClipExpError):
        code, message = error.exit_code, f"error: {error}"
    else:
        ended = isinstance(error, SystemExit) and isinstance(error.code, int) and error.code
        code, message = ended or 1, f"rank {rank}:\n{''.join(traceback.format_exception(error))}"
    return Failure(rank, code, redact(message), time.time_ns())


def write_report(folder: Path, failure: Failure) -> None:
    """Write the report of a failure, which other processes look for, and append its message to `errors.log`."""
    try:
        # Atomically, since other processes may read it at any time.
        with storage.atomic_file(folder / f"{PREFIX}{failure.rank}", durable=False) as temporary:
            temporary.write_text(json.dumps(failure._asdict()), encoding="utf-8")
    except OSError:  # for example a full disk: at least print the message
        print(printable(failure.message), file=sys.stderr, flush=True)
    write_log(folder, failure)


def write_log(folder: Path, failure: Failure) -> None:
    """Append the message of a failure to `errors.log`."""
    when = datetime.fromtimestamp(failure.time_ns / 1e9, UTC).isoformat(timespec="seconds")
    entry = f"{when} rank {failure.rank} failed with exit code {failure.code}\n{failure.message.rstrip()}\n\n"
    with suppress(OSError), (folder / LOG).open("a", encoding="utf-8") as log:
        log.write(entry)  # in one write, as several ranks may append at the same time


def facts(message: str, code: int) -> dict[str, Any]:
    """Return what is recorded of a failure."""
    return {"error": message.removeprefix("error: ").splitlines()[-20:], "exit_code": code}


def watched_by_launcher() -> bool:
    """Return True if this process is a rank that clip_exp's launcher started, and watches."""
    return _reporter is not None and _reporter.note is None


def read_failures(folder: Path) -> list[Failure]:
    """Return the reports of ranks, earliest first."""
    found = []
    for path in folder.glob(f"{PREFIX}*[0-9]"):
        try:
            found.append(Failure(**json.loads(path.read_text(encoding="utf-8"))))
        except (OSError, ValueError, TypeError):
            continue  # removed in the meantime, or not written by clip_exp
    return sorted(found, key=lambda failure: failure.time_ns)


def remove_reports(folder: Path) -> None:
    for path in folder.glob(f"{PREFIX}*"):
        path.unlink(missing_ok=True)


def remove_rank_locks(folder: Path) -> None:
    """Remove the lock files of ranks that were killed. Call this only after all ranks have ended: it would break a lock that is held."""
    for path in folder.glob(f"{PLACE}*"):
        path.unlink(missing_ok=True)


def await_cause(folder: Path) -> Failure | None:
    """Wait for a moment, and return the failure that caused the others; None if no rank reports one."""
    deadline = time.monotonic() + CAUSE_S
    while True:
        cause = next((failure for failure in read_failures(folder) if failure.is_cause), None)
        if cause is not None or time.monotonic() > deadline:
            return cause
        time.sleep(0.1)


@contextmanager
def ending_with_others(folder: Path, rank: int) -> Iterator[None]:
    """Watch the reports of other ranks, and end this process soon after one of them failed; for ranks without clip_exp's launcher."""
    left = threading.Event()

    def watch() -> None:
        while not (others := [failure for failure in read_failures(folder) if failure.rank != rank]):
            if left.wait(POLL_S):
                return
        if not left.wait(END_S):
            why = f"rank {rank} was stopped because rank {others[0].rank} failed:\n{printable(others[0].message)}"
            print(why, file=sys.stderr, flush=True)
            os._exit(DistributedError.exit_code)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        left.set()


def end_process(code: int) -> NoReturn:
    """End this process, immediately if a normal exit may wait forever: for other ranks, or for a process that cannot end."""
    distributed = sys.modules.get("torch.distributed")
    grouped = distributed is not None and distributed.is_initialized() and distributed.get_world_size() > 1
    if grouped or not _end_children():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _end_children() -> bool:
    """Kill what is left of the data loader's workers; return False if one does not end, for example while it waits for a disk.

    Python would terminate them and wait, and SIGTERM does not end a process that is stopped.
    """
    left = [process for process in multiprocessing.active_children() if process.daemon]
    if left:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch raises an error if a worker is killed
    for process in left:
        process.kill()
    for process in left:
        process.join(CHILD_S)
    return not any(process.is_alive() for process in left)


STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)  # request that a run saves and ends
REPEAT_S = 5.0  # signals within this time are the same request, delivered by both the launcher and the process group


class Stopped(BaseException):
    """Exception raised by a stop signal. A BaseException, so that no caller handles it as a failure."""


class StopRequest:
    """Flag that is set when a stop signal has been received."""

    def __init__(self) -> None:
        self.received = False


@contextmanager
def handle_signals(receive: Callable[[int], None]) -> Iterator[None]:
    """Call `receive` with the number of every stop signal inside the context; restore the previous handlers on exit.

    Outside of the main thread, where Python cannot set handlers, signals are not handled.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handler(number: int, frame: FrameType | None) -> None:
        receive(number)

    before = {number: signal.signal(number, handler) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


@contextmanager
def exit_on_signals(*, silent: bool = False) -> Iterator[None]:
    """End the process immediately on a stop signal, as preempted; for the time before there is anything to save.

    Args:
        silent: print no message, because another rank does.
    """

    def end(number: int) -> None:
        if not silent:
            name = signal.Signals(number).name
            message = f"stopped by {name} before the work started; repeat the same command to start it.\n"
            os.write(sys.stderr.fileno(), message.encode())
        os._exit(PREEMPTED_EXIT_CODE)

    with handle_signals(end):
        yield


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """Raise `Stopped` at the current point of the program on a stop signal; a later second signal ends the process immediately."""

    def stop(number: int) -> None:
        raise Stopped(f"stopped by {signal.Signals(number).name}.")

    with handle_signals(_first(stop)):
        yield


@contextmanager
def note_signals() -> Iterator[StopRequest]:
    """Yield a request that a stop signal sets, for the program to act on; a later second signal ends the process immediately."""
    request = StopRequest()

    def note(number: int) -> None:
        request.received = True

    with handle_signals(_first(note)):
        yield request


def _first(action: Callable[[int], None]) -> Callable[[int], None]:
    """Return a handler that acts on the first signal, ignores its repetitions, and ends the process on a later signal."""
    first_s: float | None = None

    def receive(number: int) -> None:
        nonlocal first_s
        now_s = time.monotonic()
        if first_s is None:
            first_s = now_s
            action(number)
        elif now_s - first_s > REPEAT_S:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    return receive
