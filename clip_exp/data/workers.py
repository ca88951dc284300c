"""Processes that decode pictures."""

import inspect
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch.utils.data import DataLoader, Dataset

from clip_exp.errors import DataError

T_co = TypeVar("T_co", covariant=True)
_LOADER = inspect.getfile(DataLoader)


def count_workers(requested: int | None, local_world_size: int) -> int:
    """Worker processes per rank: as requested, or the machine's cores shared by its ranks, one kept for training, at most 8."""
    return max(1, min(8, cores_per_rank(local_world_size) - 1)) if requested is None else requested


def cores_per_rank(local_world_size: int) -> int:
    """Cores of this machine that the process may use, shared equally by the machine's ranks."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // max(local_world_size, 1))


class WorkerLoader(DataLoader[T_co]):
    """A DataLoader whose workers leave the run's signals alone (`init_worker`).

    Args:
        options: of the DataLoader.
    """

    def __init__(self, dataset: Dataset[Any], **options: Any) -> None:
        super().__init__(dataset, worker_init_fn=init_worker, **options)

    def __iter__(self) -> Iterator[T_co]:  # type: ignore[override]  # torch names the class of its own iterator
        # torch may start threads in a worker before it calls `init_worker`. They inherit what is blocked here; one that did not
        # block SIGTERM would take it, and end the worker.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def killed_workers_are_told(key: str) -> Iterator[None]:
    """Around all that is done while a `WorkerLoader` has workers: torch tells of a killed one by an error in the midst of it.

    Args:
        key: of the configuration, for how many there are.

    Raises: DataError where a worker was killed.
    """
    try:
        yield
    except (RuntimeError, ConnectionError, EOFError) as error:
        if not _tells_of_killed_worker(error):
            raise
        raise DataError(
            "A process that reads pictures was ended from outside, mostly for lack of memory: give fewer of them "
            f"({key}), or lower data.max_image_pixels."
        ) from error


def _tells_of_killed_worker(error: Exception) -> bool:
    """By torch's words, or by a connection that broke under its loader before the worker was seen to be dead."""
    if isinstance(error, RuntimeError):
        return str(error).startswith("DataLoader worker")
    return any(frame.f_code.co_filename == _LOADER for frame, _ in traceback.walk_tb(error.__traceback__))


def init_worker(_worker: int) -> None:
    """Leave the signals that end or preempt a run to the training process, which still needs batches to finish its step.

    Ctrl-C and a scheduler's signals reach the whole process group. SIGTERM from the parent still ends the worker: that is how
    a DataLoader stops one.
    """
    for ignored in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(ignored, signal.SIG_IGN)
    parent = multiprocessing.parent_process()  # os.getppid() may be a fork server
    if parent is not None and hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with, args=(parent.pid,), daemon=True).start()


def _end_with(parent: int) -> None:
    while True:
        if signal.sigwaitinfo({signal.SIGTERM}).si_pid == parent:
            os._exit(0)
