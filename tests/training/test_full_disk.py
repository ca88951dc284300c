"""Runs on a file system of some megabytes that fills up: mounted for the test, which needs the rights to do so."""

import json
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from clip_exp.checkpoints.folders import checkpoints, damage
from tests.conftest import Run
from tests.runs import TINY, Finished, Train, run_folders

pytestmark = pytest.mark.exhaustive

RUN = (
    *(option for option in TINY if option != "resume=never"), "log_every_n_steps=1", "checkpoint_every_n_steps=10",
    "max_steps=60",
)  # fmt: skip
SECOND = "train/*/*/checkpoints/step-000020"
LESS_THAN_A_CHECKPOINT = 2**20  # bytes


class Disk:
    """A small file system."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        if self._mount("-t", "tmpfs", "-o", "size=200m", "tmpfs").returncode:
            pytest.skip("needs the rights to mount a file system")

    def shrink(self) -> None:
        """Leave less room than a checkpoint needs."""
        size = shutil.disk_usage(self.path).used + LESS_THAN_A_CHECKPOINT
        assert self._mount("-o", f"remount,size={size}").returncode == 0

    def grow(self) -> None:
        assert self._mount("-o", "remount,size=200m").returncode == 0

    def fill(self) -> None:
        """Leave no byte."""
        with (self.path / "ballast").open("ab", buffering=0) as file:
            for size in (2**20, 2**12, 1):
                try:
                    while file.write(b"x" * size):
                        pass
                except OSError:
                    continue

    def _mount(self, *arguments: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(["mount", *arguments, str(self.path)], capture_output=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    disk = Disk(tmp_path / "disk")
    yield disk
    subprocess.run(["umount", "-l", str(disk.path)], check=True)


@contextmanager
def meanwhile(is_due: Callable[[], object], act: Callable[[], None]) -> Iterator[None]:
    """While the body runs, act as soon as it is due."""

    def watch() -> None:
        deadline = time.monotonic() + 120
        while not is_due() and time.monotonic() < deadline:
            time.sleep(0.01)
        act()

    thread = threading.Thread(target=watch)
    thread.start()
    yield
    thread.join()


def left(disk: Disk) -> list[str]:
    """Return the names of temporary files and folders."""
    return [path.name for path in disk.path.rglob("*") if ".writing-" in path.name or path.name.endswith(".new")]


def ended_without_space(result: subprocess.CompletedProcess[str], disk: Disk) -> Path:
    """Check the end of a run whose last save failed; return its folder."""
    assert result.returncode == 4, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.count("Training continues without this checkpoint") >= 1
    assert "(callbacks.save_retry_s)" in result.stderr
    (folder,) = run_folders(disk.path)
    record = json.loads((folder / "run.json").read_text())
    assert (record["status"], record["exit_code"]) == ("failed", 4)
    assert "step-000020" in " ".join(record["error"])
    assert left(disk) == []
    assert all(damage(path) is None for path in checkpoints(folder))
    return folder


def finished_with_the_same_command(run: Finished, folder: Path) -> None:
    assert run.folder == folder
    assert run.record["status"] == "finished"
    assert {"error", "exit_code"}.isdisjoint(run.record)
    assert [row["step"] for row in run.metrics] == list(range(1, 61))
    assert (folder / "report.html").is_file()


@pytest.mark.parametrize(("devices", "strategy"), [(1, "auto"), (2, "ddp"), (2, "deepspeed_stage_3")])
def test_a_third_checkpoint_that_does_not_fit_does_not_end_the_run(
    devices: int, strategy: str, disk: Disk, command: Run, train: Train
) -> None:
    arguments = (*RUN, f"trainer.devices={devices}", f"strategy={strategy}", "callbacks.save_retry_s=0.5")
    with meanwhile(lambda: list(disk.path.glob(SECOND)), disk.shrink):
        result = command("train.py", *arguments, f"output_dir={disk.path}", cwd=disk.path)
    folder = ended_without_space(result, disk)
    assert [path.name for path in checkpoints(folder)] == ["step-000010", "step-000020"]
    disk.grow()
    finished_with_the_same_command(train(*arguments, output_dir=disk.path), folder)


def test_a_disk_that_fills_up_to_the_last_byte_does_not_end_the_run(disk: Disk, command: Run, train: Train) -> None:
    """Nor are the rows lost that cannot be written, and the end is recorded."""
    arguments = (*RUN, "logger=tensorboard", "callbacks.save_retry_s=0.5")
    with meanwhile(lambda: list(disk.path.glob(SECOND)), disk.fill):
        result = command("train.py", *arguments, f"output_dir={disk.path}", cwd=disk.path)
    folder = ended_without_space(result, disk)
    assert "metrics.csv cannot be written: No space left on device" in result.stderr
    (disk.path / "ballast").unlink()
    finished_with_the_same_command(train(*arguments, output_dir=disk.path), folder)


def test_a_run_that_finds_room_again_in_time_ends_well(disk: Disk, command: Run) -> None:

    def retries() -> bool:
        return any("Trying again" in log.read_text() for log in disk.path.glob("train/*/*/train.log"))

    with meanwhile(lambda: list(disk.path.glob(SECOND)), disk.shrink), meanwhile(retries, disk.grow):
        result = command("train.py", *RUN, f"output_dir={disk.path}", cwd=disk.path)
    assert result.returncode == 0, result.stdout + result.stderr
    (folder,) = run_folders(disk.path)
    finished_with_the_same_command(Finished(folder, result.stdout), folder)


def test_a_start_on_a_full_disk_is_refused_with_the_reason(disk: Disk, command: Run) -> None:
    disk.fill()
    result = command("train.py", *RUN, f"output_dir={disk.path}", cwd=disk.path)
    assert result.returncode == 4, result.stdout + result.stderr
    assert "No space left on device" in result.stderr
    assert "Traceback" not in result.stderr
    assert left(disk) == []
