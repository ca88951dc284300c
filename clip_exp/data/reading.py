"""Rows that processes are reading, so that a read that never ends is noticed and named. Does not import torch.

Data sets report each row by `reading`. A worker process writes it to its slot in shared memory, where the training process finds it; the
training process, if it reads rows itself, writes it to its heartbeat (`ranks.heartbeat`), where its watcher finds it.
"""

import atexit
import ctypes
import logging
import multiprocessing
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.sharedctypes import RawArray
from typing import Any, Generic, NamedTuple, TypeVar

from clip_exp.errors import DataError
from clip_exp.ranks import heartbeat
from clip_exp.ranks.watch import STOPPED, state_of

log = logging.getLogger(__name__)

T = TypeVar("T")
TICK_S = 2.0  # longest time between two looks at a worker that is waited for
TIMED_OUT = "DataLoader timed out"  # start of torch's message
CHECK = {True: "this row and the storage that it is on", False: "the code that makes its batches"}
END_S = 0.5  # time in which torch, too, notices that a worker was killed, and raises an error
RESTARTS = 2  # times that workers that do not start are started again
EXIT_S = 2.0  # time that workers have to end at the exit of their process
SLOT, TEXT_AT = 512, 24  # bytes of a slot, and where its text begins
COUNT, STARTED, LENGTH = range(3)  # words of a slot


class Slot:
    """Report of a worker on what it reads, in memory that it shares with the training process."""

    def __init__(self, memory: Any, worker: int) -> None:
        view = memoryview(memory).cast("B")[worker * SLOT : (worker + 1) * SLOT]
        self._words, self._text = view[:TEXT_AT].cast("q"), view[TEXT_AT:]

    def own(self) -> None:
        """Let this process be the worker."""
        self._words[STARTED], self._words[LENGTH] = 1, 0

    def reading(self, name: str) -> None:
        self._words[LENGTH] = heartbeat.write_text(self._text, name)
        self._words[COUNT] += 1

    @property
    def count(self) -> int:
        """Number of reports of the worker: while it grows, the worker makes progress."""
        return self._words[COUNT]

    @property
    def has_started(self) -> bool:
        """True once the worker has called `own`."""
        return self._words[STARTED] != 0

    @property
    def row(self) -> str:
        """Name of the row that the worker is reading; empty if it reads none."""
        return heartbeat.read_text(self._text, self._words[LENGTH])


_own: Slot | None = None  # slot of this process, if it is a worker


def reading(name: str) -> None:
    """Report that this process reads a row from now on; an empty name: that it has read all rows of a batch."""
    if _own is not None:
        _own.reading(name)
    else:
        heartbeat.reading(name)


@dataclass(frozen=True)
class Slots:
    """Slots of the workers of a loader. Can be passed to a process that is being started."""

    memory: Any
    workers: int

    @classmethod
    def create(cls, workers: int) -> "Slots":
        return cls(RawArray(ctypes.c_ubyte, workers * SLOT), workers)

    def __getitem__(self, worker: int) -> Slot:
        return Slot(self.memory, worker)

    def use(self, worker: int) -> None:
        """Let this process be a worker, whose rows are no longer those of the process that it was forked from."""
        global _own
        _own = self[worker]
        _own.own()
        heartbeat.forget()


class ReadLimit(NamedTuple):
    """Longest time that training waits for a worker that makes no progress."""

    seconds: float | None = 240.0  # None: no limit
    key: str | None = None  # configuration key that sets it, for the message

    @property
    def tick_s(self) -> float:
        """Time between two looks at the worker; 0 without a limit."""
        return 0.0 if self.seconds is None else min(TICK_S, self.seconds / 4)


DEFAULT_LIMIT = ReadLimit()


class WatchedBatches(Generic[T]):
    """Iterator over the batches of workers that does not wait forever for a worker that makes no progress.

    A thread counts how long the awaited worker makes none, in ticks: a machine that was suspended, or a process that was stopped, has
    waited for one tick. It must be a thread, since torch may wait inside a batch: for the worker that sends it, if that was stopped.

    A worker may also hang while it starts: it is forked from a process with threads, and inherits the locks that they hold. If no batch
    has come yet, the workers are then started again.

    Args:
        start: function that starts workers and returns torch's iterator, whose timeout is a tick, and the slots of the workers, which
            work on the batches in turn.
        limit: the limit.
        rank: function that returns a phrase that names this rank, for the message; empty for a single process.
    """

    def __init__(self, start: Callable[[], tuple[Any, Slots]], limit: ReadLimit, rank: Callable[[], str]) -> None:
        self.start, self.limit, self.rank = start, limit, rank
        self.batches, self.slots = start()
        self._restarts = 0
        self._received = 0
        self._waiting = False
        self._seen = (-1, -1)  # batch and reports of its worker at the last tick
        self._stalled_s = 0.0
        self._restarting = False
        self._error: DataError | None = None
        global _given_up
        _given_up = None  # of an earlier run of this process
        if limit.seconds is not None:
            threading.Thread(target=_watch, args=(weakref.ref(self), limit.tick_s), daemon=True).start()

    def __iter__(self) -> "WatchedBatches[T]":
        return self

    def __next__(self) -> T:
        self._waiting = True
        try:
            batch = self._next()
        except (RuntimeError, OSError, EOFError) as error:  # what torch raises depends on what it was doing
            if self._error is None:
                raise
            with suppress(RuntimeError):
                time.sleep(END_S)
            raise self._error from error
        finally:
            self._waiting = False
        self._received += 1
        heartbeat.beat()
        return batch

    def _next(self) -> T:
        while True:
            try:
                return next(self.batches)
            except (RuntimeError, OSError, EOFError) as error:
                if self._restarting:
                    self._restart()
                elif self._error is not None or not str(error).startswith(TIMED_OUT):
                    raise

    def _restart(self) -> None:
        with suppress(RuntimeError):
            time.sleep(END_S)
        text = "A data loader worker%s did not start within %.0f s: starting the workers again."
        log.warning(text, self.rank(), self._stalled_s)
        self.batches._shutdown_workers()  # waits for the other workers
        self.batches, self.slots = self.start()
        self._restarts += 1
        self._seen, self._stalled_s = (-1, -1), 0.0
        self._restarting = False

    def tick(self) -> None:
        """Count a tick if this process waits for a batch; kill the worker if it has made no progress for too long."""
        if not self._waiting or self._restarting or self._error is not None:
            return
        # The training thread is well while it waits: it is the worker that may not be.
        heartbeat.beat()
        awaited = self._received % self.slots.workers
        before, self._seen = self._seen, (self._received, self.slots[awaited].count)
        self._stalled_s = self._stalled_s + self.limit.tick_s if self._seen == before else 0.0
        if self.limit.seconds is not None and self._stalled_s >= self.limit.seconds:
            self._give_up(awaited)

    def _give_up(self, awaited: int) -> None:
        """Kill the worker that makes no progress, and any that was stopped: they could not end by themselves."""
        global _given_up
        pids = self._pids()
        stopped = [worker for worker, pid in enumerate(pids) if state_of(pid) == STOPPED]
        if not self._received and not stopped and self._restarts < RESTARTS and (hung := self._not_started()):
            self._restarting = True
            _kill(hung)
            return
        # Another worker that was stopped may hold the lock of the queue.
        worker = awaited if awaited in stopped or not stopped else stopped[0]
        slot = self.slots[worker]
        doing = f"reading {slot.row}" if slot.row else "reading no row" if slot.has_started else "starting"
        cause = "It was stopped by a signal (state T)." if worker in stopped else f"Check {CHECK[bool(slot.row)]}."
        raised = (
            f" If it was only slow, raise {self.limit.key}, or set it to null for no limit." if self.limit.key else ""
        )
        self._error = _given_up = DataError(
            f"data loader worker {worker} of {self.slots.workers} (process {pids[worker]}){self.rank()} has made no progress for "
            f"{self._stalled_s:.0f} s, {doing}. {cause} Repeat the same command to resume.{raised}"
        )
        _kill(pids[each] for each in {awaited, *stopped})

    def _pids(self) -> list[int]:
        return [process.pid for process in self.batches._workers]

    def _not_started(self) -> list[int]:
        """Return the process ids of the workers that have not started yet."""
        return [pid for worker, pid in enumerate(self._pids()) if not self.slots[worker].has_started]


def _kill(pids: Iterable[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


_given_up: DataError | None = None


def given_up() -> DataError | None:
    """Return the error to report if a worker of this process was killed because it made no progress; None if none was.

    torch may report that a worker was killed wherever the training thread is.
    """
    return _given_up


@atexit.register
def _end_children() -> None:
    """End the daemonic processes as Python's own exit function does, which runs later and waits forever for one that does not end: one
    that a signal stopped, or a worker that hangs while it starts.
    """
    children = [child for child in multiprocessing.active_children() if child.daemon]
    if children:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch raises an error if a worker is killed
    for child in children:
        child.terminate()
    deadline = time.monotonic() + EXIT_S
    for child in children:
        child.join(max(0.0, deadline - time.monotonic()))
    for child in children:
        child.kill()


def _watch(reference: "weakref.ref[WatchedBatches[Any]]", tick_s: float) -> None:
    """Tick until the iterator is deleted; run in a thread."""
    while True:
        time.sleep(tick_s)
        batches = reference()
        if batches is None:
            return
        batches.tick()
        del batches
