"""What several rooms' tests need."""

import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from clip_exp import cli
from clip_exp.config.targets import ALLOWED
from tests.processes import THREADS, run_forked
from tests.runs import TINY, Finished, Train, run_folders

REPOSITORY = Path(__file__).resolve().parents[1]
# The files that take longest. They come first, so that no worker is left with one of them while the others have nothing to do.
SLOWEST = (
    "campaign/test_campaign.py", "training/test_independent.py", "training/test_equivalence.py", "training/test_train_command.py", "training/test_launchers.py", "training/test_failures.py", "evaluation/test_interruption.py",
    "training/test_pretrained.py", "training/test_lora.py", "training/test_optim.py", "training/test_tasks.py",
    "training/test_resume.py", "evaluation/test_ranks.py", "export/test_onnx.py", "training/test_foreign_towers.py",
    "test_real_photographs.py", "training/test_batch_norm.py", "training/test_changed_data.py", "export/test_open_clip.py",
    "extending/test_losses.py", "evaluation/test_probe.py", "evaluation/test_launch.py", "checks/test_command.py", "weights/test_open_clip.py",
)  # fmt: skip
NOT_HANDED_ON = ("RANK", "LOCAL_RANK", "WORLD_SIZE")


def pytest_xdist_auto_num_workers() -> int:
    """Return the number of workers that `-n auto` means: one more than cores, since many tests wait for processes; 4 at most."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(4, cores + 1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {REPOSITORY / "tests" / file: place for place, file in enumerate(SLOWEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print what tests measured (`record_property`), also of those that passed."""
    measured = [
        f"{report.nodeid.rpartition('::')[2]}: {name}: {value}"
        for report in terminalreporter.getreports("passed")
        for name, value in report.user_properties
    ]
    if measured:
        terminalreporter.section("measured")
        terminalreporter.write_line("\n".join(measured))


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real photographs and captions that CLIP_EXP_DATA names."""
    folder = os.environ.get("CLIP_EXP_DATA")
    if not folder:
        pytest.skip("CLIP_EXP_DATA does not name a folder of real photographs")
    return Path(folder)


@pytest.fixture(autouse=True)
def _nothing_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the code that a command in this process allowed."""
    monkeypatch.setenv(ALLOWED, "")


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without locks, such as Lustre mounted without `flock`."""

    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)


def read_by_imports(environment: Mapping[str, str]) -> dict[str, str]:
    """What libraries look at in an environment when they are imported, and not again."""
    prefixes = ("HF_", "TRANSFORMERS_", "TORCH", "PYTHON", "OMP_", "CUDA_")
    return {key: value for key, value in environment.items() if key.startswith(prefixes)}


DOOR = "clip_exp/__main__.py"  # of `python -m clip_exp`
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def command() -> Run:
    """Run `python <script> <arguments>` as a user does, from any folder; returns code, stdout and stderr.

    What a script imports is imported already, and its ranks are forked, unless it is to start `cold`. Figures are left blank
    unless they are to be drawn.
    """
    started_with = read_by_imports({**os.environ, **THREADS})

    def run(
        script: str,
        *arguments: str,
        cwd: Path,
        timeout_s: float = 300,
        cold: bool = False,
        draw: bool = False,
        **environment: str,
    ) -> subprocess.CompletedProcess[str]:
        clean = {key: value for key, value in os.environ.items() if key not in NOT_HANDED_ON}
        child = {**clean, "COLUMNS": "200", **THREADS, **environment}
        if not cold and read_by_imports(child) == started_with:
            return run_forked(
                REPOSITORY / script, arguments, cwd=cwd, environment=child, timeout_s=timeout_s, draw=draw
            )
        return subprocess.run(
            [sys.executable, str(REPOSITORY / script), *arguments],
            cwd=cwd,
            env=child,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )

    return run


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run like `command`, in this process: for what ends before any work begins."""

    def run(script: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        name, *rest = arguments if script == DOOR else (Path(script).stem, *arguments)
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", [])
        monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
        capsys.readouterr()
        code = cli.run(name, list(rest))
        return subprocess.CompletedProcess([script, *arguments], code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def train(command, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Train by the command line in an output folder of its own, which must end well."""

    def run(*overrides: str, output_dir: Path | None = None, draw: bool = False, **environment: str) -> Finished:
        output_dir = output_dir or tmp_path_factory.mktemp("outputs")
        result = command(
            "train.py", *overrides, f"output_dir={output_dir}", cwd=output_dir, timeout_s=600, draw=draw, **environment
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return Finished(run_folders(output_dir)[-1], result.stdout)

    return run


def train_once(name: str, train: Train, tmp_path_factory: pytest.TempPathFactory, *overrides: str) -> Finished:
    """Train for all workers of this test run: the first that asks trains, the others wait for it."""
    base = tmp_path_factory.getbasetemp()
    output_dir = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    output = output_dir / "output.txt"
    with FileLock(output_dir.with_suffix(".lock")):
        if not output.exists():
            output_dir.mkdir(exist_ok=True)
            output.write_text(train(*overrides, output_dir=output_dir, draw=True).output, encoding="utf-8")
    return Finished(run_folders(output_dir)[-1], output.read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def single(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Twenty steps in one process, which every other way of running them must reproduce."""
    intervals = ("log_every_n_steps=1", "checkpoint_every_n_steps=10", "val_every_n_steps=10")
    return train_once("single", train, tmp_path_factory, *TINY, "max_steps=20", *intervals)


@pytest.fixture(scope="session")
def digits(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The run that the README begins with: 20 s of training on handwritten digits."""
    return train_once("digits", train, tmp_path_factory, "experiment=digits", "resume=never")
