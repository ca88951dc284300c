"""The number of worker processes, and the errors when shared memory runs out."""

import errno
import gc
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from clip_exp.data.loader import WorkerLoader, _SharedMemory, count_workers, report_killed_workers
from clip_exp.data.reading import ReadLimit
from clip_exp.errors import DataError

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")


@pytest.fixture(autouse=True)
def _loaders_end_with_their_test() -> Iterator[None]:
    """Torch reports a killed worker again when its loader is deleted."""
    yield
    gc.collect()


NO_ROOM = "unable to allocate shared memory(shm) for file </torch_1_2_3>: No space left on device (28)"


@pytest.mark.parametrize(
    ("cores", "ranks", "on_cpu", "on_cuda"),
    [(1, 1, 1, 1), (2, 1, 1, 1), (2, 2, 1, 1), (16, 1, 8, 15), (16, 4, 3, 3), (64, 2, 8, 31), (64, 8, 7, 7)],
)
def test_workers_leave_a_core_for_training_and_are_eight_at_most_on_a_cpu(
    cores: int, ranks: int, on_cpu: int, on_cuda: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clip_exp.data.loader.usable_cores", lambda: cores)
    assert count_workers(None, ranks) == count_workers(None, ranks, "cpu") == on_cpu
    assert count_workers(None, ranks, "cuda") == on_cuda
    assert count_workers(0, ranks, "cuda") == 0
    assert count_workers(40, ranks) == 40


class Batch(NamedTuple):
    image: Tensor
    number: int


class Images(Dataset[int]):
    def __getitem__(self, index: int) -> int:
        return index


def collate(samples: list[int]) -> Batch:
    return Batch(torch.full((len(samples), 8), samples[0], dtype=torch.uint8), samples[0])


def loader(count: int = 1, **options: int) -> WorkerLoader[Batch]:
    """Return a loader with a timeout, which expires if a batch is lost."""
    return WorkerLoader(
        Images(),
        sampler=range(8),
        batch_size=4,
        collate_fn=collate,
        num_workers=count,
        limit=ReadLimit(20.0),
        **options,
    )


def test_batches_come_from_workers_as_they_are_made() -> None:
    for count in (0, 1, 2):
        batches = list(loader(count))
        assert [batch.number for batch in batches] == [0, 4]
        assert [batch.image.tolist() for batch in batches] == [[[0] * 8] * 4, [[4] * 8] * 4]


# torch may report it again when the loader is deleted.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_batch_for_which_there_is_no_shared_memory_is_an_error_with_remedies(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch itself only prints the error, in a thread of the worker, and waits for the batch forever."""

    def refuse(storage: object, *arguments: object) -> None:
        raise RuntimeError(NO_ROOM)

    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", refuse)  # the worker is a fork
    monkeypatch.setattr("clip_exp.data.loader._shared_memory", lambda: _SharedMemory(67_108_864, 1_500_000))
    batches = loader(batch_bytes=40_000_000)
    with pytest.raises(DataError) as caught, report_killed_workers("data.num_workers"):
        list(batches)
    assert str(caught.value) == (
        "Shared memory ran out. Worker processes pass batches through /dev/shm, which has 67 MB, 1.5 MB free. "
        "About 80 MB are needed: 1 x 2 batches of 40 MB (workers x prefetched batches). Enlarge it (docker run "
        "--shm-size=16g or --ipc=host; in Kubernetes an emptyDir with medium: Memory, mounted at /dev/shm), or use fewer "
        "workers (data.num_workers). With data.num_workers=0 no shared memory is needed."
    )


class Ended(Dataset[int]):
    """Data set whose second item ends the worker by a signal."""

    def __init__(self, number: signal.Signals) -> None:
        self.number = number

    def __getitem__(self, index: int) -> int:
        if index:
            os.kill(os.getpid(), self.number)
        return index


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("number", "reported"),
    [
        (signal.SIGBUS, r"^Shared memory ran out\. .*/dev/shm"),
        (signal.SIGKILL, "killed by a signal, usually because memory ran out"),
    ],
)
def test_sigbus_is_lack_of_shared_memory_and_sigkill_of_memory(number: signal.Signals, reported: str) -> None:
    for use in (list, lambda batches: (next(batches), time.sleep(5))):
        batches = iter(WorkerLoader(Ended(number), sampler=[0, 1], num_workers=1))
        with pytest.raises(DataError, match=reported), report_killed_workers("data.num_workers"):
            use(batches)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_is_lack_of_shared_memory_only_where_workers_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space left"), report_killed_workers("data.num_workers"):
        refuse()
    monkeypatch.setattr("multiprocessing.synchronize.SemLock.__init__", refuse)
    with pytest.raises(DataError, match="Shared memory ran out"), report_killed_workers("data.num_workers"):
        iter(loader())


def test_a_system_without_the_folder_of_shared_memory_is_reported_the_remedies_and_never_warned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("clip_exp.data.loader.SHARED_MEMORY", "/no/such/folder")
    assert loader(batch_bytes=1 << 60).shortage("num_workers") is None
    expected = pytest.raises(DataError, match=r"^Shared memory ran out\. .*fewer workers \(num_workers\)")
    with expected, report_killed_workers("num_workers"):
        raise RuntimeError(NO_ROOM)
