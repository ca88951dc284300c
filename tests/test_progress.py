"""Tests of the progress bar, which rank 0 shows for the work of all ranks."""

import io
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest
from rich.console import Console

from clip_exp import progress as module
from clip_exp.progress import NotebookProgress, in_notebook, progress, silence
from clip_exp.training.callbacks import Progress as TrainingProgress
from clip_exp.training.summary import _table


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    written = io.StringIO()
    monkeypatch.setenv("TERM", "xterm")  # rich draws nothing on a dumb one
    monkeypatch.setattr(module, "Console", lambda **_: Console(file=written, force_terminal=True, width=100))
    return written


def work() -> None:
    with progress(4, "flowers: 8 images", total=8) as advance:
        advance(1)
        advance(3)


def test_rank_0_shows_the_items_of_all_ranks(terminal: io.StringIO) -> None:
    work()
    assert "flowers: 8 images" in terminal.getvalue()
    assert "8/8" in terminal.getvalue()


def test_other_ranks_show_nothing(terminal: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    work()
    assert terminal.getvalue() == ""


def test_nothing_is_shown_inside_another_bar(terminal: io.StringIO) -> None:
    with silence():
        work()
    assert terminal.getvalue() == ""
    work()
    assert terminal.getvalue() != ""


def test_nothing_is_shown_without_a_terminal(capfd: pytest.CaptureFixture) -> None:
    work()
    assert capfd.readouterr() == ("", "")


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Make this process the kernel of a notebook; return the texts of the output, of which each replaces the one before."""
    texts: list[str] = []

    class Handle:
        def update(self, data: dict[str, str], raw: bool) -> None:
            assert raw
            texts.append(data["text/plain"])

    def display(data: dict[str, str], raw: bool, display_id: bool) -> Handle:
        assert raw
        assert display_id
        return Handle()

    ipython: Any = ModuleType("IPython")
    ipython.get_ipython = lambda: SimpleNamespace(kernel=object())
    shows: Any = ModuleType("IPython.display")
    shows.display = display
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", shows)
    monkeypatch.setattr(NotebookProgress, "INTERVAL_S", 0.0)
    return texts


def test_a_notebook_shows_one_output_that_is_updated_and_removed(
    shown: list[str], capfd: pytest.CaptureFixture
) -> None:
    work()
    assert "flowers: 8 images" in shown[0]
    assert any("8/8" in text for text in shown)
    assert shown[-1] == ""
    assert capfd.readouterr() == ("", "")


def test_a_notebook_is_not_updated_more_often_than_it_can_be_read(
    shown: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NotebookProgress, "INTERVAL_S", 60.0)
    work()
    assert len(shown) == 2


def test_a_terminal_with_ipython_is_no_notebook(shown: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert in_notebook()
    monkeypatch.setattr(sys.modules["IPython"], "get_ipython", lambda: SimpleNamespace())
    assert not in_notebook()
    monkeypatch.delitem(sys.modules, "IPython")
    assert not in_notebook()


def test_training_in_a_notebook_shows_a_bar_and_writes_its_table_as_text(
    shown: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics: Any = SimpleNamespace(latest={}, global_batch_size=8)
    callback, trainer = (
        TrainingProgress("auto", metrics),
        cast(Any, SimpleNamespace(is_global_zero=True, global_step=2)),
    )
    callback.on_train_start(trainer, SimpleNamespace(total_steps=4))
    callback.on_train_batch_end(trainer, SimpleNamespace(total_steps=4), None, None, 0)
    callback.on_train_end(trainer, None)
    assert "2/4" in shown[-1]
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    summary = {
        "name": "a",
        "steps": 1,
        "samples_seen": 8,
        "seconds": 1.0,
        "samples_per_s": None,
        "metrics": {"train/loss": 2.0},
        "goodput": {"restarts": 0},
    }
    assert "train/loss" in _table(tmp_path, summary)
