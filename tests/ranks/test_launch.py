"""Several ranks end as one: with the message and the exit code of the one that failed."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from clip_exp.errors import DistributedError
from clip_exp.ranks import launch
from clip_exp.runs import RunRecord


def run(folder: Path, *plan: str) -> int:
    (folder / "plan.json").write_text(json.dumps(plan))
    return launch.run_ranks("tests.ranks.door", folder, len(plan), "auto")


@pytest.fixture(autouse=True)
def _short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "SETTLE_S", 1.5)


@pytest.mark.parametrize(
    ("plan", "code", "message"),
    [
        (("lost touch", "bad data"), 3, "error: picture 7 cannot be read."),
        (("lost touch", "lost touch", "bad data"), 3, "error: picture 7 cannot be read."),
        (("bad name", "lost touch"), 3, r"error: picture \x1b[2J.jpg cannot be read."),
        (("bug", "bad data"), 3, "error: picture 7 cannot be read."),
        (("lost touch", "bug"), 1, "ValueError: a bug"),
        (("wait", "bad data"), 3, "error: picture 7 cannot be read."),
        (("lost touch", "lost touch"), 6, "error: lost touch with another rank that ended."),
    ],
)
def test_the_rank_that_failed_in_cause_is_the_one_that_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture, plan: tuple[str, ...], code: int, message: str
) -> None:
    assert run(tmp_path, *plan) == code
    told = capsys.readouterr().err
    assert told.strip().splitlines()[-1] == message
    assert (told.count("error: "), told.count("Traceback")) == ((0, 1) if code == 1 else (1, 0))
    record = RunRecord(tmp_path).values
    assert (record["status"], record["exit_code"]) == ("failed", code)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.json", "run.json"]


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (("lost touch", "killed"), r"rank 1 of 2 was ended by signal 9 \(SIGKILL\); the others were stopped\..*memory"),
        (("wait", "killed"), r"rank 1 of 2 was ended by signal 9 \(SIGKILL\)"),
        (("lost touch", "killed", "wait"), r"rank 1 of 3 was ended by signal 9 \(SIGKILL\)"),
        (("9", "wait"), "rank 0 of 2 ended with code 9 and no message"),
    ],
)
def test_a_rank_that_cannot_tell_is_told_of(tmp_path: Path, plan: tuple[str, ...], message: str) -> None:
    with pytest.raises(DistributedError, match=message):
        run(tmp_path, *plan)
    record = RunRecord(tmp_path).values
    assert (record["status"], record["exit_code"]) == ("failed", 6)


@pytest.mark.parametrize("plan", [("143", "143"), ("143", "lost touch"), ("143", "wait")])
def test_ranks_that_a_signal_stopped_end_all_as_preempted(tmp_path: Path, plan: tuple[str, ...]) -> None:
    assert run(tmp_path, *plan) == 143
    assert RunRecord(tmp_path).values["status"] == "preempted"


def test_a_signal_to_the_launcher_reaches_every_rank(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def ask() -> None:
        time.sleep(1.5)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=ask).start()
    assert run(tmp_path, "wait", "wait") == 143
    assert RunRecord(tmp_path).values["status"] == "preempted"
    assert capsys.readouterr().err == "stopped by a signal; the same command goes on from what was saved.\n"


def test_all_well_is_zero(tmp_path: Path) -> None:
    assert run(tmp_path, "0", "0", "0") == 0
