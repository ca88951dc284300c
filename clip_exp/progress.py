"""Progress bar, shown only on a terminal, or in a notebook, where it is updated in place."""

import importlib
import io
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from clip_exp.ranks.environment import is_first_rank
from clip_exp.ranks.heartbeat import beat

_silent = ContextVar("silent", default=False)


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f}/s", style="progress.data.speed")


def in_notebook() -> bool:
    """Return True if this process is the kernel of a notebook, whose cells show outputs that can be updated."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return getattr(shell, "kernel", None) is not None


class NotebookProgress(Progress):
    """Progress bar in the output of a notebook's cell, as text; rich would need ipywidgets.

    Args:
        columns: columns of the bar.
        transient: remove the bar at its end.
    """

    INTERVAL_S = 0.2
    WIDTH = 140

    def __init__(self, *columns: ProgressColumn, transient: bool = False) -> None:
        super().__init__(*columns, auto_refresh=False, console=Console(file=io.StringIO(), force_jupyter=False))
        self._is_transient = transient
        self._handle: Any = None
        self._drawn_s = float("-inf")

    def start(self) -> None:
        display = importlib.import_module("IPython.display").display
        self._handle = display({"text/plain": ""}, raw=True, display_id=True)

    def stop(self) -> None:
        if self._handle is not None:
            self._draw("" if self._is_transient else self._text())
            self._handle = None

    def refresh(self) -> None:
        """Draw the bar, unless it was drawn a moment ago."""
        if self._handle is not None and time.monotonic() - self._drawn_s >= self.INTERVAL_S:
            self._draw(self._text())

    def update(self, *args: Any, **values: Any) -> None:
        super().update(*args, **values)
        self.refresh()

    def advance(self, *args: Any, **values: Any) -> None:
        super().advance(*args, **values)
        self.refresh()

    def _text(self) -> str:
        buffer = io.StringIO()
        Console(file=buffer, force_jupyter=False, width=self.WIDTH).print(self.get_renderable())
        return buffer.getvalue().rstrip()

    def _draw(self, text: str) -> None:
        self._handle.update({"text/plain": text}, raw=True)
        self._drawn_s = time.monotonic()


@contextmanager
def progress(count: int, what: str | None, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on rank 0, and yield a function to call with the number of items done since the last call.

    Args:
        count: number of items of this rank.
        what: text in front of the bar; None: no bar.
        total: number of items of all ranks, whose progress is assumed to equal that of this rank; None: `count`.
    """
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Speed(), TimeRemainingColumn())
    shown = what is not None and not _silent.get() and is_first_rank()
    total = count if total is None else total
    bar = (
        NotebookProgress(*columns, transient=True)
        if shown and in_notebook()
        else Progress(*columns, console=console, transient=True, disable=not (shown and console.is_terminal))
    )
    with bar:
        task = bar.add_task(what or "", total=total)

        def advance(done: int) -> None:
            beat()  # whoever has progress to show does not hang
            bar.advance(task, done * total / max(1, count))

        yield advance


@contextmanager
def silence() -> Iterator[None]:
    """Disable progress bars inside the block, because another one is already on the terminal."""
    before = _silent.set(True)
    try:
        yield
    finally:
        _silent.reset(before)
