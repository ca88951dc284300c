"""Processes that decode images, and the shared memory that their batches come through."""

import errno
import inspect
import multiprocessing
import os
import re
import signal
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clip_exp.devices import usable_cores
from clip_exp.errors import DataError
from clip_exp.ranks.group import local_world_size

T_co = TypeVar("T_co", covariant=True)
MOST_BESIDE_CPU_TRAINING = 8  # workers
SHARED_MEMORY = "/dev/shm"
_LOADER = inspect.getfile(DataLoader)
# "unable to allocate shared memory(shm) for file </torch_1_2_3>: No space left on device (28)", "unable to write to file
# </torch_…>", and of a worker that SIGBUS ended: "It is possible that dataloader's workers are out of shared memory."
_NO_SHARED_MEMORY = re.compile(r"shared memory ?\(shm\)|file </torch_|workers are out of shared memory")


def count_workers(requested: int | None, local_world_size: int, device_type: str = "cpu") -> int:
    """Worker processes per rank: as requested, or one for each of the rank's cores but the one that training keeps.

    Training on a CPU computes on the same cores, and so slowly that 8 workers keep up with it.

    Args:
        requested: by the configuration; None: choose.
        local_world_size: ranks of this machine.
        device_type: that the rank computes on, `cpu` or `cuda`.
    """
    if requested is not None:
        return requested
    free = max(1, cores_per_rank(local_world_size) - 1)
    return free if device_type == "cuda" else min(MOST_BESIDE_CPU_TRAINING, free)


def cores_per_rank(local_world_size: int) -> int:
    """Cores of this machine that the process may use, shared equally by the machine's ranks."""
    return max(1, usable_cores() // max(local_world_size, 1))


class WorkerLoader(DataLoader[T_co]):
    """A DataLoader whose workers leave the run's signals alone (`init_worker`) and report where shared memory runs out.

    Args:
        batch_bytes: about the size of a batch; 0: unknown.
        options: of the DataLoader.
    """

    def __init__(self, dataset: Dataset[Any], *, batch_bytes: int = 0, **options: Any) -> None:
        super().__init__(dataset, worker_init_fn=init_worker, **options)
        self.batch_bytes = batch_bytes
        if self.num_workers:
            self.collate_fn = _IntoSharedMemory(self.collate_fn)
            _loaders.add(self)

    def __iter__(self) -> Iterator[T_co]:  # type: ignore[override]  # torch names the class of its own iterator
        # torch may start threads in a worker before it calls `init_worker`. They inherit what is blocked here; one that did not
        # block SIGTERM would take it, and end the worker.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    @property
    def shared_bytes(self) -> int:
        """About the shared memory that the batches of all workers of this machine's ranks take."""
        return local_world_size() * self.num_workers * (self.prefetch_factor or 0) * self.batch_bytes

    def shortage(self, key: str) -> str | None:
        """Return a warning where the shared memory that is free now is too small for the workers' batches, else None.

        Args:
            key: of the configuration, for the number of workers.
        """
        memory = _shared_memory()
        if memory is None or self.shared_bytes <= memory.free:
            return None
        return f"Training may run out of shared memory. {_advice(self, memory, key)}"


_loaders: "weakref.WeakSet[WorkerLoader[Any]]" = weakref.WeakSet()  # with workers


@dataclass(frozen=True)
class _IntoSharedMemory:
    """A collate function whose tensors are in shared memory, which workers pass them through, when it returns.

    Otherwise a thread of the worker would move them there, and where memory runs out it prints the error and drops the batch:
    training would wait for it forever.
    """

    collate: Callable[[Any], Any]

    def __call__(self, samples: Any) -> Any:
        batch = self.collate(samples)
        for value in batch if isinstance(batch, tuple | list) else (batch,):
            if isinstance(value, Tensor) and value.numel():
                value.share_memory_()
        return batch


class _SharedMemory(NamedTuple):
    size: int  # bytes
    free: int


def _shared_memory() -> _SharedMemory | None:
    try:
        state = os.statvfs(SHARED_MEMORY)
    except OSError:  # a system that keeps it elsewhere
        return None
    return _SharedMemory(state.f_frsize * state.f_blocks, state.f_frsize * state.f_bavail)


def _advice(loader: WorkerLoader[Any] | None, memory: _SharedMemory | None, key: str) -> str:
    sentences = []
    if memory is not None:
        size, free = _megabytes(memory.size), _megabytes(memory.free)
        sentences.append(f"Worker processes pass batches through {SHARED_MEMORY}, which has {size}, {free} of it free.")
    if loader is not None and loader.shared_bytes:
        workers = local_world_size() * loader.num_workers
        batches = f"{workers} x {loader.prefetch_factor} batches of {_megabytes(loader.batch_bytes)}"
        sentences.append(
            f"About {_megabytes(loader.shared_bytes)} are needed: {batches} (workers x what each prepares)."
        )
    sentences.append(
        "Enlarge it (docker run --shm-size=16g or --ipc=host; in Kubernetes an emptyDir with medium: Memory, mounted at "
        f"{SHARED_MEMORY}), or use fewer workers ({key}); {key}=0 needs none."
    )
    return " ".join(sentences)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.{0 if count >= 1e7 else 1}f} MB"


@contextmanager
def killed_workers_are_told(key: str) -> Iterator[None]:
    """Around all that is done while a `WorkerLoader` has workers: torch tells of a killed one by an error in the midst of it.

    Args:
        key: of the configuration, for the number of workers.

    Raises: DataError where a worker was killed, or shared memory ran out.
    """
    try:
        yield
    except (RuntimeError, OSError, EOFError) as error:
        explained = explain_worker_failure(error, key)
        if explained is None:
            raise
        raise explained from error


def explain_worker_failure(error: BaseException, key: str) -> DataError | None:
    """Return what to report of an error that says that a worker was killed or that shared memory ran out; None of any other.

    Args:
        key: of the configuration, for the number of workers.
    """
    if _tells_of_shared_memory(error):
        largest = max(_loaders, key=lambda loader: loader.shared_bytes, default=None)
        return DataError(f"Shared memory ran out. {_advice(largest, _shared_memory(), key)}")
    if not _tells_of_killed_worker(error):
        return None
    return DataError(
        "A worker process that reads images was killed from outside, mostly for lack of memory: use fewer of them "
        f"({key}), or lower data.max_image_pixels."
    )


def _tells_of_shared_memory(error: BaseException) -> bool:
    """By torch's words for a full /dev/shm, raised or as the cause; or by a loader that could not make its semaphores there."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOSPC and _is_from_loader(error)
    causes = (error, error.__cause__)
    return isinstance(error, RuntimeError) and any(_NO_SHARED_MEMORY.search(str(cause)) for cause in causes)


def _tells_of_killed_worker(error: BaseException) -> bool:
    """By torch's words, or by a connection that broke under its loader before the worker was seen to be dead."""
    if isinstance(error, RuntimeError):
        return str(error).startswith("DataLoader worker")
    return isinstance(error, ConnectionError | EOFError) and _is_from_loader(error)


def _is_from_loader(error: BaseException) -> bool:
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
