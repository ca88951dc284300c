"""Failures of ranks: each reports its own before anything that can block, and a rank that cannot continue is ended in time.

After an exception much may block: a GPU that waits for a collective which other ranks never join, the group's destruction, a
logger's server. So a failing rank first writes its report into the folder of the work, where the launcher and the other ranks
find it, and a timer then ends the process, wherever it may be stuck.
"""

import json
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
from typing import NamedTuple, NoReturn

import clip_exp.storage as storage
from clip_exp.errors import PREEMPTED_EXIT_CODE, ClipExpError, DistributedError, printable
from clip_exp.secrets import redact

END_S = 10.0  # for a rank that has reported its failure, or another's, to end by itself
POLL_S = 5.0  # between looks for the reports of others, each of which lists a folder that hundreds of ranks may share
CAUSE_S = 3.0  # for the rank that failed first to report, where this one only lost touch with it
PREFIX = ".error-rank"  # of the reports, one file per rank
PLACE = ".lock-rank"  # of the locks, one file per rank
PLACE_S = 10.0  # for a rank of an earlier start to end
LOG = "errors.log"  # every rank's message stays here


class Failure(NamedTuple):
    """The failure of a rank."""

    rank: int
    code: int
    message: str
    time_ns: int  # when it was reported

    @property
    def is_cause(self) -> bool:
        """Whether the rank failed by itself, and did not just lose touch with another one."""
        return self.code != DistributedError.exit_code


@dataclass
class Reporter:
    """Reports the failure of this process, a rank of several; the first report counts."""

    folder: Path  # of the work, which all ranks share
    rank: int
    note: Callable[[Failure], None] | None = (
        None  # called with the failure to record, this rank's or the one that caused it
    )
    failure: Failure | None = field(default=None, init=False)

    def report(self, error: BaseException) -> Failure:
        """Write the report of a failure, and see that this process ends soon."""
        if self.failure is not None:
            return self.failure
        self.failure = failure = describe(self.rank, error)

        def end() -> None:
            time.sleep(END_S)
            if self.note is not None:  # no launcher prints it, and this process has not come to it by itself
                print(printable(failure.message), file=sys.stderr, flush=True)
            os._exit(failure.code)

        threading.Thread(target=end, daemon=True).start()
        try:
            # Whole, since others look for it at any time.
            with storage.atomic_file(self.folder / f"{PREFIX}{failure.rank}", durable=False) as temporary:
                temporary.write_text(json.dumps(failure._asdict()), encoding="utf-8")
        except OSError:  # a full disk, say: the message is printed all the same
            print(printable(failure.message), file=sys.stderr, flush=True)
        when = datetime.fromtimestamp(failure.time_ns / 1e9, UTC).isoformat(timespec="seconds")
        entry = f"{when} rank {failure.rank} failed with exit code {failure.code}\n{failure.message.rstrip()}\n\n"
        with suppress(OSError), (self.folder / LOG).open("a", encoding="utf-8") as log:
            log.write(entry)  # by one write, as ranks append at once
        if self.note is not None:
            with suppress(OSError):  # a full disk must not hide the failure
                self.note(failure if failure.is_cause else await_cause(self.folder) or failure)
        return failure


@contextmanager
def place_in(folder: Path, rank: int) -> Iterator[None]:
    """Hold a rank's place in a folder; raise a DistributedError where the rank of an earlier start still works there after a while."""
    with ExitStack() as held:
        try:
            # What has no locks was warned of where the folder was opened.
            lock = storage.lock(folder / f"{PLACE}{rank}", wait_s=PLACE_S, on_no_locks=lambda *_: None, remove=True)
            held.enter_context(lock)
        except storage.InUse as error:
            raise DistributedError(
                f"rank {rank} of an earlier start still works in {folder} ({error.owner}): wait for it, or end it."
            ) from None
        except OSError:
            pass  # a full disk, say, which is for the work itself to report
        yield


_reporter: Reporter | None = None  # of this process


@contextmanager
def reporting_to(reporter: Reporter) -> Iterator[None]:
    """Inside, `report` goes to this reporter."""
    global _reporter
    _reporter = reporter
    try:
        yield
    finally:
        _reporter = None


def report(error: BaseException) -> None:
    """Report the failure of this process where it is a rank of several; for whoever sees it before something that can block."""
    if _reporter is not None:
        _reporter.report(error)


def describe(rank: int, error: BaseException) -> Failure:
    """Return a failure with its message: of an expected error the text, of any other the traceback."""
    if isinstance(error, ClipExpError):
        code, message = error.exit_code, f"error: {error}"
    else:
        ended = isinstance(error, SystemExit) and isinstance(error.code, int) and error.code
        code, message = ended or 1, f"rank {rank}:\n{''.join(traceback.format_exception(error))}"
    return Failure(rank, code, redact(message), time.time_ns())


def read_failures(folder: Path) -> list[Failure]:
    """Return the reports of ranks, the earliest first."""
    found = []
    for path in folder.glob(f"{PREFIX}*[0-9]"):
        try:
            found.append(Failure(**json.loads(path.read_text(encoding="utf-8"))))
        except (OSError, ValueError, TypeError):
            continue  # removed meanwhile, or not written by us
    return sorted(found, key=lambda failure: failure.time_ns)


def remove_reports(folder: Path) -> None:
    for path in folder.glob(f"{PREFIX}*"):
        path.unlink(missing_ok=True)


def remove_places(folder: Path) -> None:
    """Remove the lock files of ranks that were killed. Only where all ranks have ended: a place that is held would be lost."""
    for path in folder.glob(f"{PLACE}*"):
        path.unlink(missing_ok=True)


def await_cause(folder: Path) -> Failure | None:
    """Return the failure that others followed from, for which a moment is waited; None if no rank reports one."""
    deadline = time.monotonic() + CAUSE_S
    while True:
        cause = next((failure for failure in read_failures(folder) if failure.is_cause), None)
        if cause is not None or time.monotonic() > deadline:
            return cause
        time.sleep(0.1)


@contextmanager
def ending_with_others(folder: Path, rank: int) -> Iterator[None]:
    """Inside, this process, a rank of several that no launcher of ours watches, ends soon after another has reported a failure."""
    left = threading.Event()

    def watch() -> None:
        while not (others := [failure for failure in read_failures(folder) if failure.rank != rank]):
            if left.wait(POLL_S):
                return
        if not left.wait(END_S):
            why = f"rank {rank} was ended, because rank {others[0].rank} failed:\n{printable(others[0].message)}"
            print(why, file=sys.stderr, flush=True)
            os._exit(DistributedError.exit_code)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        left.set()


def end_process(code: int) -> NoReturn:
    """End this process; at once where ranks have not left their group together, since an orderly exit may wait for the others."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized() and distributed.get_world_size() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)  # ask a run to save and end
REPEAT_S = 5.0  # launchers and process groups deliver the same request twice


class Stopped(BaseException):
    """A signal asked this process to end. Not an Exception: no caller should take it for a failure of its own."""


class StopRequest:
    """Request to stop, by a signal that may have been received."""

    def __init__(self) -> None:
        self.received = False


@contextmanager
def handle_signals(receive: Callable[[int], None]) -> Iterator[None]:
    """Inside, every stop signal calls `receive` with its number; the handlers from before are restored on leaving.

    Outside the main thread, where Python sets no handlers, signals are left alone.
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
    """Inside, a stop signal ends the process at once, as preempted: for the time before there is anything to save.

    Args:
        silent: print nothing, since another rank does.
    """

    def end(number: int) -> None:
        if not silent:
            name = signal.Signals(number).name
            message = f"stopped by {name} before the work began; the same command starts it.\n"
            os.write(sys.stderr.fileno(), message.encode())
        os._exit(PREEMPTED_EXIT_CODE)

    with handle_signals(end):
        yield


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """Inside, a stop signal raises `Stopped` where the program is; a later second one ends the process at once."""

    def stop(number: int) -> None:
        raise Stopped(f"stopped by {signal.Signals(number).name}.")

    with handle_signals(_first(stop)):
        yield


@contextmanager
def note_signals() -> Iterator[StopRequest]:
    """Inside, a stop signal is noted in the request, for the program to act on; a later second one ends the process at once."""
    request = StopRequest()

    def note(number: int) -> None:
        request.received = True

    with handle_signals(_first(note)):
        yield request


def _first(action: Callable[[int], None]) -> Callable[[int], None]:
    """Return a receiver that acts on the first signal, ignores repetitions of it, and ends the process on a later one."""
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
