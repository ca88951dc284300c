"""A single process that hangs ends by its watchdog, whatever it hangs in; one that was stopped or debugged is left alone."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

KINDS = ("sleeps", "holds", "stopped", "debugged", "suspended", "slow")
SUSPENDED_S = 4.0


@dataclass
class Ended:
    """What was left of a process."""

    code: int
    output: str
    folder: Path

    @property
    def noted(self) -> str:
        return (self.folder / "noted").read_text() if (self.folder / "noted").exists() else ""


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """Every kind of process, all at the same time."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    processes = {
        kind: subprocess.Popen(
            [sys.executable, "-m", "tests.ranks.hanging", str(folder), kind], cwd=REPOSITORY, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for kind, folder in folders.items()
    }  # fmt: skip
    for process in processes.values():
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    os.killpg(processes["suspended"].pid, signal.SIGSTOP)
    time.sleep(SUSPENDED_S)
    os.killpg(processes["suspended"].pid, signal.SIGCONT)
    assert processes["stopped"].poll() is None
    processes["stopped"].send_signal(signal.SIGCONT)
    outputs = {kind: process.communicate(timeout=30)[1] for kind, process in processes.items()}
    return {kind: Ended(processes[kind].returncode, outputs[kind], folder) for kind, folder in folders.items()}


def test_a_process_that_hangs_ends_with_the_exit_code_of_a_hang(ended: dict[str, Ended]) -> None:
    found = ended["sleeps"]
    assert found.code == 6
    assert "this run hangs: no progress for" in found.output
    assert "in the forward pass of step 7" in found.output
    assert found.noted.startswith("failed 6 ['this run hangs")
    assert {path.name for path in found.folder.iterdir()} == {"noted"}


def test_a_process_whose_library_never_returns_pythons_lock_is_killed(ended: dict[str, Ended]) -> None:
    found = ended["holds"]
    assert found.code == -signal.SIGKILL
    assert "this run hangs" in found.output
    assert found.noted.startswith("failed 6")
    assert {path.name for path in found.folder.iterdir()} == {"noted"}


@pytest.mark.parametrize("kind", ["stopped", "debugged", "suspended", "slow"])
def test_a_process_that_does_not_hang_is_left_alone(kind: str, ended: dict[str, Ended]) -> None:
    found = ended[kind]
    assert (found.code, found.output, found.noted) == (0, "", "")
    assert not list(found.folder.iterdir())


def test_no_watchdog_outlives_its_process(ended: dict[str, Ended]) -> None:
    folders = [str(found.folder) for found in ended.values()]
    lines = [
        path.read_bytes().decode(errors="replace") for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()
    ]
    assert not [line for line in lines if any(folder in line for folder in folders)]
