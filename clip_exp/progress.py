"""One line of progress on a terminal, nothing elsewhere."""

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
def progress(share: int, what: str | None, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """Yields a function to call with the number of items done since the last call. Only rank 0 shows it.

    Args:
        share: items of this rank.
        what: shown before the bar; None: silent.
        total: items of all the ranks, which are taken to be as far as this one; None: `share`.
    """
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Speed(), TimeRemainingColumn())
    disable = what is None or _silent.get() or not console.is_terminal or not is_first_rank()
    total = share if total is None else total
    with Progress(*columns, console=console, transient=True, disable=disable) as bar:
        task = bar.add_task(what or "", total=total)
        yield lambda done: bar.advance(task, done * total / max(1, share))


@contextmanager
def silence() -> Iterator[None]:
    """Inside, nothing is shown: another line of progress is on the terminal."""
    before = _silent.set(True)
    try:
        yield
    finally:
        _silent.reset(before)
