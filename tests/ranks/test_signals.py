"""A stop signal raises or is noted, once; the same request delivered twice is one; a later one ends the process."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from clip_exp.errors import DataError
from clip_exp.ranks import failure as signals
from clip_exp.ranks.failure import STOP_SIGNALS, Stopped, note_signals, stop_on_signals
from tests.processes import run_on_ranks


@pytest.fixture(autouse=True)
def _handlers_are_restored() -> Iterator[None]:
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    yield
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_raises_where_the_program_is(number: signal.Signals) -> None:
    with pytest.raises(Stopped, match=rf"stopped by {number.name}\."), stop_on_signals():
        signal.raise_signal(number)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_noted_and_its_repetition_is_the_same_request(number: signal.Signals) -> None:
    with note_signals() as request:
        assert not request.received
        signal.raise_signal(number)
        assert request.received
        signal.raise_signal(number)


@pytest.mark.parametrize("context", ["stop_on_signals", "note_signals"])
def test_a_later_signal_ends_the_process_at_once(context: str) -> None:
    code = (
        "import signal\nfrom clip_exp.ranks import failure as signals\nsignals.REPEAT_S = 0.0\n"
        f"with signals.{context}():\n"
        "    for attempt in range(2):\n"
        "        try:\n            signal.raise_signal(signal.SIGTERM)\n"
        "        except signals.Stopped:\n            pass\n"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGTERM


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_before_the_work_begins_a_signal_ends_the_process_as_preempted(number: signal.Signals) -> None:
    code = f"import signal\nfrom clip_exp.ranks import failure as signals\nwith signals.exit_on_signals():\n    signal.raise_signal({number.value})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 143
    assert done.stderr == f"stopped by {number.name} before the work started; repeat the same command to start it.\n"


def test_other_threads_leave_signals_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def use() -> None:
        with signals.stop_on_signals(), note_signals():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert seen == [before]


def report_while_torch_reports_a_worker(rank: int, folder: Path) -> int:
    def raise_as_torch_does(*_: object) -> None:
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")

    class Late(DataError):
        """Error whose message is read just when the signal comes."""

        def __str__(self) -> str:
            os.kill(os.getpid(), signal.SIGCHLD)
            return super().__str__()

    signal.signal(signal.SIGCHLD, raise_as_torch_does)
    return signals.Reporter(folder, rank).report(Late("image 7 cannot be read.")).code


def test_the_report_of_a_failure_is_complete_although_torch_raises_about_a_killed_worker(tmp_path: Path) -> None:
    assert run_on_ranks(report_while_torch_reports_a_worker, 1, tmp_path) == [3]
    (found,) = signals.read_failures(tmp_path)
    assert found.message == "error: image 7 cannot be read."
    assert "image 7" in (tmp_path / signals.LOG).read_text(encoding="utf-8")
