"""The short version, for the terminal."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from clip_exp.checks.verdicts import Level, Verdict
from clip_exp.reports.data_page import loaders

MARKS = {Level.error: ("✗", "bold red"), Level.warning: ("!", "yellow"), Level.note: ("·", "dim")}


def show(report: dict[str, Any], verdicts: list[Verdict], folder: Path, next_command: str | None) -> None:
    """Print what there is, what is wrong with it, and where to look next.

    Args:
        next_command: None where the data is to be repaired first.
    """
    console = Console()
    console.print(_overview(report))
    console.print(_problems(verdicts) if verdicts else Text("Nothing is wrong with it.", "green"))
    following = {"Lists": folder, "Open": folder / "report.html"} | ({"Next": next_command} if next_command else {})
    for name, value in following.items():
        console.print(f"{name + ':':7}{value}", soft_wrap=True, highlight=False, markup=False)


def _problems(verdicts: list[Verdict]) -> Table:
    table = Table("", "where", "what was found", "what to do", show_lines=True)
    for column in table.columns[2:]:
        column.overflow = "fold"
    for verdict in verdicts:
        mark, style = MARKS[verdict.level]
        table.add_row(Text(mark, style), verdict.split, Text(verdict.text), Text(f"{verdict.fix}."))
    return table


def _overview(report: dict[str, Any]) -> Table:
    splits = report["splits"]
    table = Table("", *splits)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, value in _FACTS.items():
        table.add_row(name, *(value(split) for split in splits.values()))
    speed = report["speed"]
    if speed["samples_per_s"] is not None:
        table.add_row(f"pairs/s, {loaders(speed['loader_workers'])}", f"{speed['samples_per_s']:,.0f}")
    return table


def _number(quantiles: dict[str, float] | None, *names: str) -> str:
    return "–" if quantiles is None else " / ".join(f"{quantiles[name]:,.0f}" for name in names)


def _size(split: dict[str, Any]) -> str:
    width, height = (split["sizes"][name] for name in ("width", "height"))
    return "–" if width is None else f"{width['p50']:,.0f} x {height['p50']:,.0f}"


_FACTS: dict[str, Any] = {
    "rows": lambda split: f"{split['rows']:,}",
    "pictures": lambda split: f"{split['pictures']:,}",
    "of them checked": lambda split: f"{split['pictures_checked']:,}",
    "bad rows": lambda split: f"{split['bad_rows']['count']:,}",
    "bad pictures": lambda split: f"{split['bad_pictures']['count']:,}",
    "middle size, pixels": _size,
    "tokens: middle / 95 % / most": lambda split: _number(split["captions"]["tokens"], "p50", "p95", "max"),
    "captions cut": lambda split: f"{split['captions']['truncated']['count']:,}",
    "distinct captions": lambda split: f"{split['captions']['distinct']:,}",
}
