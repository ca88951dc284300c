"""When a run saves, which checkpoints stay, and what happens if one cannot be written or takes long."""

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from clip_exp.checkpoints.folders import checkpoints, folder_of, manifests
from clip_exp.checkpoints.io import SafeCheckpointIO, Snapshot
from clip_exp.errors import CheckpointError
from clip_exp.ranks.failure import StopRequest
from clip_exp.training import saving
from clip_exp.training.saving import Checkpointer, Preemption
from clip_exp.training.skipped_steps import SkippedSteps
from tests.checkpoints.test_folders import write
from tests.processes import run_on_ranks

NONE_SKIPPED = SkippedSteps(0, lambda step: [])


class FullDisk(SafeCheckpointIO):
    """Writes to a disk that is full for a number of saves."""

    full = 0

    def _write(self, copied: Snapshot, path: Path, step: int) -> None:
        if self.full:
            self.full -= 1
            raise CheckpointError(f"cannot write the checkpoint {path}: No space left on device.")
        write(path.parents[1], step, **self.metadata)
        assert self.on_saved is not None
        self.on_saved(step)


class Disk:
    """A trainer whose disk is full for the given number of saves."""

    def __init__(self, run_dir: Path, full: int = 0, asynchronous: bool = False) -> None:
        self.run_dir = run_dir
        self.global_step = 0
        self.callback_metrics: dict[str, torch.Tensor] = {}
        self.sanity_checking = False
        self.io = FullDisk(asynchronous=lambda size: asynchronous)
        self.io.full = full
        self.strategy = SimpleNamespace(barrier=lambda name: dist.barrier() if dist.is_initialized() else None)

    def save_checkpoint(self, path: Path) -> None:
        """As Lightning's: rank 0 writes, and the others wait at the end."""
        if not dist.is_initialized() or dist.get_rank() == 0:
            self.io.save_checkpoint({"state_dict": {}, "global_step": self.global_step}, path)
        self.strategy.barrier("")


both_ways = pytest.mark.parametrize("asynchronous", [False, True], ids=["synchronous", "asynchronous"])


def checkpointer(disk: Disk, **options: Any) -> Checkpointer:
    options = {"retry_s": 0.0, **options}
    callback = Checkpointer(disk.run_dir, disk.io, 10, "val/loss", "min", {}, lambda: None, NONE_SKIPPED, **options)
    disk.io.on_saved = callback.prune
    return callback


def validated(callback: Checkpointer, disk: Any, step: int, loss: float, total_steps: int = 100) -> None:
    disk.global_step, disk.callback_metrics = step, {"val/loss": torch.tensor(loss)}
    callback.on_validation_end(disk, SimpleNamespace(total_steps=total_steps))


@both_ways
def test_a_save_that_fails_is_reported_and_the_next_interval_tries_again(
    asynchronous: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    disk = Disk(tmp_path, asynchronous=asynchronous)
    callback = checkpointer(disk)
    validated(callback, disk, 10, loss=3.0)
    callback.settle()
    disk.io.full = 2
    for step, loss in ((20, 1.0), (30, 1.5)):
        validated(callback, disk, step, loss)
    callback.settle()
    assert (callback.saved_step, callback.best) == (10, 3.0)
    assert caplog.text.count("No space left on device. Training continues") == 2
    validated(callback, disk, 40, loss=2.0)
    callback.settle()
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000010", "step-000040"]
    # The better ones were never kept.
    assert manifests(tmp_path)[folder_of(tmp_path, 40)].best


def names(folder: Path) -> list[int]:
    return [manifest.step for manifest in manifests(folder).values()]


@both_ways
@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, [20, 70, 80]),
        ({"keep_last": 3}, [20, 60, 70, 80]),
        ({"keep_last": None}, [10, 20, 30, 40, 50, 60, 70, 80]),
        ({"keep_every_n_steps": 30}, [20, 30, 60, 70, 80]),
        ({"keep_last": 4, "keep_every_n_steps": 40}, [20, 40, 50, 60, 70, 80]),
    ],
)
def test_the_last_the_best_and_every_nth_checkpoint_stay(
    options: dict[str, Any], kept: list[int], asynchronous: bool, tmp_path: Path
) -> None:
    disk = Disk(tmp_path, asynchronous=asynchronous)
    callback = checkpointer(disk, **options)
    for step in range(10, 90, 10):
        validated(callback, disk, step, loss=1.0 if step == 20 else 2.0)
    callback.settle()
    assert names(tmp_path) == kept


def test_a_checkpoint_that_stays_is_written_between_the_others(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    callback = checkpointer(disk, keep_every_n_steps=15)
    for step in range(1, 33):
        validated(callback, disk, step, loss=1.0)
    assert names(tmp_path) == [1, 15, 20, 30]


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that were waited, by a clock that does not run otherwise."""
    pauses: list[float] = []
    monkeypatch.setattr(saving, "time", SimpleNamespace(monotonic=lambda: sum(pauses), sleep=pauses.append))
    return pauses


@both_ways
def test_the_last_save_is_retried_until_there_is_room(asynchronous: bool, tmp_path: Path, slept: list[float]) -> None:
    disk: Any = Disk(tmp_path, full=3, asynchronous=asynchronous)
    callback = checkpointer(disk, retry_s=60.0)
    validated(callback, disk, 100, loss=1.0)
    assert slept == [10, 10, 10]
    assert callback.saved_step == 100
    assert manifests(tmp_path)[folder_of(tmp_path, 100)].metrics == {"val/loss": 1.0}


def stop(callback: Checkpointer, disk: Any) -> None:
    """End the run as a signal does."""
    preemption = Preemption(StopRequest())
    preemption.checkpointer = callback
    preemption._stop(disk)


@both_ways
@pytest.mark.parametrize(
    "end", [lambda callback, disk: callback.on_train_end(disk, None), stop], ids=["end", "preemption"]
)
def test_the_last_save_fails_for_good_after_the_configured_time_and_says_what_is_kept(
    end: Callable[[Checkpointer, Any], None], asynchronous: bool, tmp_path: Path, slept: list[float]
) -> None:
    disk: Any = Disk(tmp_path, asynchronous=asynchronous)
    callback = checkpointer(disk, retry_s=25.0)
    validated(callback, disk, 90, loss=1.0)
    callback.settle()
    disk.global_step, disk.io.full = 95, 1000
    with pytest.raises(
        CheckpointError, match=r"No space left.*Gave up after 25 s \(callbacks\.save_retry_s\).*step-000090"
    ):
        end(callback, disk)
    assert slept == [10, 10, 5]


def save_on_a_rank(rank: int, run_dir: Path, cases: list[tuple[int, bool, bool]]) -> list[str | int | None]:
    dist.init_process_group("gloo", init_method=f"file://{run_dir}/store", rank=rank, world_size=2)
    logging.disable()
    ends: list[str | int | None] = []
    for full, last, asynchronous in cases:
        disk: Any = Disk(run_dir, full if rank == 0 else 0, asynchronous)
        disk.global_step = 10
        callback = checkpointer(disk, retry_s=0.1)
        try:
            callback.save(disk, last=last)
            callback.settle()
            ends.append(callback.saved_step)
        except CheckpointError as error:
            ends.append(str(error))
    dist.destroy_process_group()
    return ends


def test_ranks_stay_together_when_the_first_cannot_save(tmp_path: Path) -> None:
    left_out, given_up, retried = (1, False), (1000, True), (1, True)
    cases = [(*case, asynchronous) for asynchronous in (False, True) for case in (left_out, given_up, retried)]
    first, second = run_on_ranks(save_on_a_rank, 2, tmp_path, cases)
    assert first == second
    assert (first[0], first[2], first[3], first[5]) == (None, 10, None, 10)
    assert "Checkpoints in" in first[1]
    assert "Checkpoints in" in first[4]


def test_one_save_is_in_progress_and_counts_only_when_it_is_on_disk(tmp_path: Path) -> None:
    """Training continues while a checkpoint is written; the next save, and the comparison of the best value, wait for it."""
    disk = Disk(tmp_path, asynchronous=True)
    callback, written = checkpointer(disk), threading.Event()
    write_now = disk.io._write
    disk.io._write = lambda *save: (written.wait(60), write_now(*save))[1]  # type: ignore[method-assign]
    validated(callback, disk, 10, loss=3.0)
    assert (callback.saved_step, checkpoints(tmp_path)) == (None, [])
    waits = threading.Thread(target=validated, args=(callback, disk, 20, 1.0))
    waits.start()
    waits.join(0.2)
    assert waits.is_alive()
    written.set()
    waits.join()
    callback.settle()
    assert (callback.saved_step, names(tmp_path)) == (20, [10, 20])


def test_a_run_that_fails_still_completes_the_save_in_progress(tmp_path: Path) -> None:
    disk: Any = Disk(tmp_path, asynchronous=True)
    callback = checkpointer(disk)
    validated(callback, disk, 10, loss=3.0)
    callback.on_exception(disk, None, ValueError())
    assert names(tmp_path) == [10]
