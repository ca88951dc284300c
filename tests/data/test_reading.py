"""A worker that makes no progress is given up and named with its row; a slow or suspended one is not, and none is left behind."""

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from torch.utils.data import Dataset
from torch.utils.data._utils import signal_handling

from clip_exp.data.loader import WorkerLoader, report_killed_workers
from clip_exp.data.reading import ReadLimit, reading
from clip_exp.errors import DataError
from clip_exp.ranks.watch import state_of
from tests.conftest import REPOSITORY
from tests.exhaustive import repeat_beyond

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")


@pytest.fixture(autouse=True)
def _loaders_end_with_their_test() -> Iterator[None]:
    """A loader that is deleted later waits for its workers in another test."""
    yield
    gc.collect()


LIMIT = ReadLimit(1.0, "data.timeout_s")


class Rows(Dataset[int]):
    """Rows that take a time to read, and one that never ends."""

    def __init__(self, seconds: float = 0.0, endless: int | None = None) -> None:
        self.seconds = seconds
        self.endless = endless

    def __getitem__(self, index: int) -> int:
        reading(f"row {index}.jpg")
        time.sleep(60 if index == self.endless else self.seconds)
        return index


def test_a_worker_that_reads_a_row_forever_is_named_with_it() -> None:
    batches = iter(WorkerLoader(Rows(endless=5), limit=LIMIT, sampler=range(8), batch_size=2, num_workers=2))
    assert [next(batches).tolist() for _ in range(2)] == [[0, 1], [2, 3]]
    with pytest.raises(DataError) as caught, report_killed_workers("data.num_workers"):
        next(batches)
    text = str(caught.value)
    assert "data loader worker 0 of 2 (process " in text
    assert "no progress for 1 s, reading row 5.jpg. Check this row" in text
    assert "raise data.timeout_s" in text


def test_a_worker_that_hangs_after_reading_is_not_blamed_on_a_row() -> None:
    loader = WorkerLoader(Rows(), limit=LIMIT, sampler=range(4), batch_size=2, num_workers=1, collate_fn=sleep)
    with pytest.raises(DataError, match=r"reading no row\. Check the code that makes its batches"):
        next(iter(loader))


def sleep(_: object) -> None:
    time.sleep(60)


class HangsInItsStart:
    """A worker that is forked while a thread of its parent holds a lock that it needs: so it hangs before it can do anything."""

    def __init__(self, marks: Path, times: int) -> None:
        self.marks, self.times = marks, times

    def __call__(self) -> None:
        for number in range(self.times):
            with suppress(FileExistsError):
                (self.marks / str(number)).touch(exist_ok=False)
                time.sleep(60)


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_of_which_one_hangs_in_its_start_are_started_again(
    persistent: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(signal_handling, "_set_worker_signal_handlers", HangsInItsStart(tmp_path, 2))
    loader = WorkerLoader(
        Rows(), limit=LIMIT, sampler=range(8), batch_size=2, num_workers=2, persistent_workers=persistent
    )
    with report_killed_workers("data.num_workers"):
        batches = iter(loader)
        assert [batch.tolist() for batch in batches] == [[0, 1], [2, 3], [4, 5], [6, 7]]
        assert [batch.tolist() for batch in loader] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert "did not start within 1 s: starting the workers again." in caplog.text


def test_a_worker_that_never_starts_is_an_error_and_is_not_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signal_handling, "_set_worker_signal_handlers", HangsInItsStart(tmp_path, 100))
    loader = WorkerLoader(Rows(), limit=LIMIT, sampler=range(8), batch_size=2, num_workers=1)
    with pytest.raises(
        DataError, match=r"data loader worker 0 of 1 \(process [1-9]\d*\) has made no progress for 1 s, starting"
    ):
        next(iter(loader))
    assert not multiprocessing.active_children()


def test_a_batch_that_takes_longer_than_the_limit_is_waited_for_while_its_rows_come() -> None:
    loader = WorkerLoader(Rows(0.4), limit=LIMIT, sampler=range(5), batch_size=5, num_workers=1)
    assert [batch.tolist() for batch in loader] == [[0, 1, 2, 3, 4]]


def test_without_a_limit_a_row_is_waited_for() -> None:
    loader = WorkerLoader(Rows(2.0), limit=ReadLimit(None), sampler=range(1), num_workers=1)
    assert [batch.tolist() for batch in loader] == [[0]]


ENDS = """
import multiprocessing, os, signal, sys, time
from clip_exp.data.loader import WorkerLoader
from clip_exp.data.reading import ReadLimit
from clip_exp.ranks.failure import end_process
from tests.data.test_reading import Rows

if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[2])
    limit = ReadLimit(1.0 if sys.argv[1] == "suspended" else 60.0)
    loader = WorkerLoader(Rows(), limit=limit, sampler=range(100), num_workers=1, persistent_workers=True)
    batches = iter(loader)
    next(batches)
    worker = batches.batches._workers[0].pid
    print(worker, flush=True)
    if sys.argv[1] == "suspended":
        sys.stdin.readline()
        for _ in batches:
            pass
        sys.exit(0)
    os.kill(worker, signal.SIGSTOP)
    if sys.argv[1] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if sys.argv[1] == "command":
        end_process(0)
"""


CODES = {"killed": -signal.SIGKILL, "script": 0, "command": 0}
ENDED = [(end, method) for end in CODES for method in ("fork", "spawn")]


@pytest.mark.parametrize("case", repeat_beyond([("killed", "fork")], ENDED), ids=str)
def test_a_stopped_worker_neither_blocks_the_end_nor_outlives_it(case: tuple[str, str], tmp_path: Path) -> None:
    end, method = case
    (tmp_path / "ends.py").write_text(ENDS)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "ends.py"), end, method], cwd=tmp_path, capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert done.returncode == CODES[end], done.stderr
    worker = int(done.stdout)
    for _ in range(200):  # it may first end what it does
        if state_of(worker) in ("X", "Z"):
            return
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the stopped worker outlived its training process")


@pytest.mark.exhaustive
def test_a_process_that_was_suspended_with_its_workers_waits_on(tmp_path: Path) -> None:
    (tmp_path / "ends.py").write_text(ENDS)
    with subprocess.Popen(
        [sys.executable, str(tmp_path / "ends.py"), "suspended", "fork"], cwd=tmp_path, start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        process.stdin.write("\n")
        process.stdin.flush()
        os.killpg(process.pid, signal.SIGSTOP)
        time.sleep(4)
        os.killpg(process.pid, signal.SIGCONT)
        assert process.wait(30) == 0
