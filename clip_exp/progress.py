"""Progress bar, shown only on a terminal."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from clip_exp.ranks.environment import is_first_rank

_silent = ContextVar("silent", default=False)


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f}/s", style="progress.data.speed")


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
    disable = what is None or _silent.get() or not console.is_terminal or not is_first_rank()
    total = count if total is None else total
    with Progress(*columns, console=console, transient=True, disable=disable) as bar:
        task = bar.add_task(what or "", total=total)
        yield lambda done: bar.advance(task, done * total / max(1, count))


@contextmanager
def silence() -> Iterator[None]:
    """Disable progress bars inside the block, because another one is already on the terminal."""
    before = _silent.set(True)
    try:
        yield
    finally:
        _silent.reset(before)
