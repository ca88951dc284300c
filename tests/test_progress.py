"""Tests of the progress bar, which rank 0 shows for the work of all ranks."""

import io

import pytest
from rich.console import Console

from clip_exp import progress as module
from clip_exp.progress import progress, silence


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
