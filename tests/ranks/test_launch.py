"""Several ranks end as one: with the message and the exit code of the one that failed."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from clip_exp.ranks import failure, launch
from clip_exp.ranks.environment import free_port, local_placement
from clip_exp.ranks.failure import LOG
from clip_exp.ranks.launch import launch_work
from tests.conftest import REPOSITORY
from tests.ranks.planned import Planned

HOLD = """
import sys
from pathlib import Path
from clip_exp.ranks import failure
failure.PLACE_S = 0.5
with failure.lock_rank(Path(sys.argv[1]), 1):
    print("here", flush=True)
    sys.stdin.read()
"""


def run(folder: Path, *plan: str) -> tuple[int, dict[str, Any]]:
    """The exit code of ranks that end as planned, and what was recorded of them."""
    planned = Planned(folder, *plan)
    code = launch_work(planned)[1]
    assert {path.name for path in folder.iterdir()} <= {"plan.json", LOG}
    assert len(planned.records) <= 1
    return code, planned.records[0] if planned.records else {}


@pytest.fixture(autouse=True)
def _short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "SETTLE_S", 1.5)
    monkeypatch.setattr(launch, "GRACE_S", 1.5)


@pytest.mark.parametrize(
    ("plan", "code", "message"),
    [
        (("lost connection", "bad data"), 3, "error: image 7 cannot be read."),
        (("lost connection", "lost connection", "bad data"), 3, "error: image 7 cannot be read."),
        (("bad name", "lost connection"), 3, r"error: image \x1b[2J.jpg cannot be read."),
        (("bug", "later bad data"), 1, "ValueError: a bug"),
        (("blocked bug", "wait"), 1, "ValueError: a bug"),
        (("aborted", "bug"), 1, "ValueError: a bug"),
        (("wait", "exits"), 5, "SystemExit: 5"),
        (("lost connection", "bug"), 1, "ValueError: a bug"),
        (("wait", "bad data"), 3, "error: image 7 cannot be read."),
        (("lost connection", "lost connection"), 6, "error: lost the connection to another rank, which ended."),
    ],
)
def test_the_rank_that_failed_in_cause_is_the_one_that_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture, plan: tuple[str, ...], code: int, message: str
) -> None:
    found, record = run(tmp_path, *plan)
    assert found == code
    output = capsys.readouterr().err
    assert output.strip().splitlines()[-1] == message
    assert (output.count("error: "), output.count("Traceback")) == ((0, 1) if code in (1, 5) else (1, 0))
    assert (record["status"], record["exit_code"]) == ("failed", code)
    kept = (tmp_path / LOG).read_text(encoding="utf-8")
    messages = {
        "lost connection": "lost the connection to",
        "bad data": "image 7",
        "bug": "ValueError: a bug",
        "exits": "SystemExit: 5",
    }
    assert all(
        f"rank {rank} failed" in kept and messages[end] in kept for rank, end in enumerate(plan) if end in messages
    )
    assert record["error"][-1] == message.removeprefix("error: ").replace(r"\x1b", "\x1b")


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (
            ("lost connection", "killed"),
            r"rank 1 of 2 was killed by signal 9 \(SIGKILL\); the others were stopped\..*memory",
        ),
        (("wait", "killed"), r"rank 1 of 2 was killed by signal 9 \(SIGKILL\)"),
        (("lost connection", "killed", "wait"), r"rank 1 of 3 was killed by signal 9 \(SIGKILL\)"),
        (("bug", "killed"), r"rank 1 of 2 was killed by signal 9 \(SIGKILL\)"),
        (("lost connection", "9"), "rank 1 of 2 ended with exit code 9 and no message"),
        (("9", "wait"), "rank 0 of 2 ended with exit code 9 and no message"),
    ],
)
def test_a_rank_that_cannot_report_is_named(
    tmp_path: Path, capfd: pytest.CaptureFixture, plan: tuple[str, ...], message: str
) -> None:
    """Only it: a rank that waits for it does not report that it was stopped."""
    code, record = run(tmp_path, *plan)
    assert (code, record["status"], record["exit_code"]) == (6, "failed", 6)
    (output,) = capfd.readouterr().err.splitlines()
    assert re.match(f"error: {message}", output)
    assert record["error"] == [output.removeprefix("error: ")]


def test_a_rank_that_could_not_keep_its_message_ends_all_with_its_code(
    tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    """As on a full disk."""
    code, record = run(tmp_path, "4", "lost connection")
    assert (code, record["exit_code"]) == (4, 4)
    assert "rank 0 of 2 ended with exit code 4 (see its message above; it could not be saved)" in capfd.readouterr().err


@pytest.mark.parametrize("plan", [("143", "143"), ("143", "lost connection"), ("143", "wait"), ("signaled", "wait")])
def test_ranks_that_a_signal_stopped_end_all_as_preempted(
    tmp_path: Path, capsys: pytest.CaptureFixture, plan: tuple[str, ...]
) -> None:
    assert run(tmp_path, *plan) == (143, {"status": "preempted"})
    assert capsys.readouterr().err == ""


def test_a_rank_waits_for_that_of_an_earlier_start_and_works_beside_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the launcher alone was killed, and the command is given again at once."""
    monkeypatch.setattr(failure, "PLACE_S", 5.0)
    hold = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(hold, cwd=REPOSITORY, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True) as earlier:
        assert earlier.stdout is not None
        assert earlier.stdout.readline() == "here\n"
        with failure.lock_rank(tmp_path, 0):
            pass  # of another rank
        threading.Timer(0.5, earlier.kill).start()
        with failure.lock_rank(tmp_path, 1):
            assert earlier.wait(5) == -signal.SIGKILL
    with failure.lock_rank(tmp_path, 1):
        done = subprocess.run(hold, cwd=REPOSITORY, capture_output=True, text=True)
    assert "rank 1 of an earlier start is still running in" in done.stderr


def test_a_start_waits_for_a_rank_of_an_earlier_one(tmp_path: Path) -> None:
    hold = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(hold, cwd=REPOSITORY, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True) as earlier:
        assert earlier.stdout is not None
        assert earlier.stdout.readline() == "here\n"
        threading.Timer(4.0, earlier.kill).start()
        assert run(tmp_path, "0", "0") == (0, {})
        assert earlier.poll() is not None


def test_a_signal_to_the_launcher_reaches_every_rank(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    before = signal.getsignal(signal.SIGTERM)

    def ask() -> None:
        time.sleep(1.5)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=ask).start()
    assert run(tmp_path, "wait", "wait") == (143, {"status": "preempted"})
    assert (
        capfd.readouterr().err == "stopped by SIGTERM before the work started; repeat the same command to start it.\n"
    )
    assert signal.getsignal(signal.SIGTERM) == before


def test_all_well_is_zero(tmp_path: Path) -> None:
    assert run(tmp_path, "0", "0", "0") == (0, {})


def test_one_device_is_this_process_and_a_finished_folder_needs_none(tmp_path: Path) -> None:
    assert launch_work(Planned(tmp_path, "7")) == (tmp_path, 7)
    assert launch_work(Planned(tmp_path, "7", "7", finished=True)) == (tmp_path, 0)


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        (("7", "8"), ["{} 7", "{} 8"]),
        (("0", "bad data"), ["{} 0", "rank 1: image 7 cannot be read."]),
        (("0", "lost connection"), ["{} 0", "lost the connection to another rank, which ended."]),
        (("finished", "finished"), ["{} 0", "{} 0"]),
    ],
)
def test_ranks_that_torchrun_starts_work_in_the_folder_of_the_first(
    tmp_path: Path, plan: tuple[str, ...], expected: list[str]
) -> None:
    port = free_port()
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.ranks.planned", str(tmp_path), *plan], cwd=REPOSITORY,
            env={**os.environ, **local_placement(rank, 2, port).variables()}, stdout=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    output = [process.communicate(timeout=120)[0].strip() for process in ranks]
    assert output == [line.format(tmp_path / "0") for line in expected]
