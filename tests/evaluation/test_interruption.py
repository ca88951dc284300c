"""A stopped or killed evaluation reports it, leaves no partial files, and resumes from the cached features."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.exhaustive import repeat_beyond
from tests.small_runs import write_image

IMAGES = 1601
BLOCKS = 51  # of at most 32 images


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of two classes of large images, as links, since only their paths need to differ."""
    root = tmp_path_factory.mktemp("images")
    originals = [write_image(root / f"{name}.png", seed, (400, 400)) for seed, name in enumerate("ab")]
    for number in range(IMAGES):
        link = root / "classes" / ("cat", "dog")[number % 2] / f"{number:04d}.png"
        link.parent.mkdir(parents=True, exist_ok=True)
        os.link(originals[number % 2], link)
    return root / "classes"


@pytest.fixture
def arguments(tmp_path: Path, run_dir: Path, images: Path) -> list[str]:
    return [
        f"run={run_dir}", "task=image_folder", f"task.image_folder.root={images}", "accelerator=cpu", "num_workers=1",
        "task.image_folder.templates=simple", f"output_dir={tmp_path / 'outputs'}", "name=interrupted",
    ]  # fmt: skip


@contextmanager
def evaluating(tmp_path: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Start the command and wait until it has cached a few blocks."""
    process = subprocess.Popen(
        [sys.executable, str(REPOSITORY / "evaluate.py"), *arguments], cwd=tmp_path, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while len(blocks(tmp_path)) < 4 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        assert process.poll() is None, process.communicate()
        yield process
    finally:
        process.kill()
        process.communicate()


def blocks(tmp_path: Path) -> dict[str, tuple[int, int]]:
    """Return the cached blocks with their modification state."""
    found = (tmp_path / "outputs" / "cache" / "features").glob("*/block-*.safetensors")
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in found}


def processes_of(tmp_path: Path) -> list[int]:
    """Return the ranks and workers of a test, which have its folder on their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and str(tmp_path) in (entry / "cmdline").read_text():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def record(tmp_path: Path) -> dict:
    (path,) = (tmp_path / "outputs" / "evaluate" / "interrupted").glob("*/run.json")
    assert not list((path.parent / "eval").glob("*"))
    return json.loads(path.read_text())


def assert_nothing_runs(tmp_path: Path) -> None:
    deadline = time.monotonic() + 15  # a worker looks for its parent every five seconds
    while processes_of(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not processes_of(tmp_path)


def assert_resumes(tmp_path: Path, run_dir: Path, command, arguments: list[str]) -> None:
    """Check that the same command writes only the missing blocks, and counts every image once."""
    kept = blocks(tmp_path)
    assert 4 <= len(kept) < BLOCKS
    done = command("evaluate.py", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    after = blocks(tmp_path)
    assert len(after) == BLOCKS
    assert {name: after[name] for name in kept} == kept
    result = json.loads((run_dir / "eval" / "image_folder.json").read_text())
    assert result["protocol"]["images"] == IMAGES


@pytest.mark.parametrize(
    ("devices", "number"),
    [
        (1, signal.SIGINT),
        pytest.param(2, signal.SIGTERM, marks=pytest.mark.exhaustive),
        pytest.param(1, signal.SIGTERM, marks=pytest.mark.exhaustive),
        pytest.param(2, signal.SIGINT, marks=pytest.mark.exhaustive),
    ],
)
def test_a_signal_ends_it_as_preempted_and_the_same_command_resumes(
    tmp_path: Path, run_dir: Path, arguments: list[str], command, devices: int, number: signal.Signals
) -> None:
    arguments = [*arguments, f"devices={devices}"]
    with evaluating(tmp_path, *arguments) as process:
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 143, stderr
    assert stderr.strip() == f"stopped by {number.name}. The same command resumes from the cached features."
    assert record(tmp_path)["status"] == "preempted"
    assert_nothing_runs(tmp_path)
    assert_resumes(tmp_path, run_dir, command, arguments)


@pytest.mark.parametrize("devices", repeat_beyond((2,), (1, 2)))
def test_a_kill_leaves_no_partial_file_and_the_same_command_resumes(
    tmp_path: Path, run_dir: Path, arguments: list[str], command, devices: int
) -> None:
    arguments = [*arguments, f"devices={devices}"]
    with evaluating(tmp_path, *arguments) as process:
        process.kill()
        process.communicate()
    assert record(tmp_path)["status"] == "running"
    assert_nothing_runs(tmp_path)
    assert_resumes(tmp_path, run_dir, command, arguments)


@pytest.mark.exhaustive
def test_a_rank_that_dies_ends_all_with_one_message(
    tmp_path: Path, run_dir: Path, arguments: list[str], command
) -> None:
    arguments = [*arguments, "devices=2"]
    with evaluating(tmp_path, *arguments) as process:
        os.kill(rank_of(process, 1), signal.SIGKILL)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 6, stderr
    assert stderr.startswith("error: rank 1 of 2 was killed by signal 9 (SIGKILL); the others were stopped.")
    assert len(stderr.strip().splitlines()) == 1
    assert record(tmp_path)["status"] == "failed"
    assert record(tmp_path)["exit_code"] == 6
    assert_nothing_runs(tmp_path)
    assert_resumes(tmp_path, run_dir, command, arguments)


def rank_of(process: subprocess.Popen[str], rank: int) -> int:
    """Return the process of a rank; its workers have the same environment, but are not children of the launcher."""
    for entry in Path("/proc").iterdir():
        try:
            if not entry.name.isdecimal() or f"\nPPid:\t{process.pid}\n" not in (entry / "status").read_text():
                continue
            if f"\0RANK={rank}\0" in (entry / "environ").read_text():
                return int(entry.name)
        except OSError:
            continue
    raise AssertionError(f"no rank {rank} of process {process.pid}")
