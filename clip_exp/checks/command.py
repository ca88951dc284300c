"""`clip-exp check-data`: check a data set before training on it."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from clip_exp.checks.splits import open_splits
from clip_exp.checks.verdicts import Level, Verdict
from clip_exp.config.base import broken_rules, plain
from clip_exp.config.commands import CheckDataConfig, CheckFormat
from clip_exp.config.files import to_yaml
from clip_exp.data import preflight
from clip_exp.errors import ConfigError, DataError
from clip_exp.reports.data_report import loaders
from clip_exp.reports.html import command_line, split_arguments
from clip_exp.runs import RunRecord, create_run_folder, name_problems, write_text
from clip_exp.secrets import leaks

# Keys of this command that training does not have, or has with another meaning.
ONLY_HERE = ("name", "output_dir", "decode", "max_images", "max_leakage", "num_workers", "format")


def check_data(config: CheckDataConfig, arguments: list[str]) -> int:
    """Scan the data, write the findings to a new folder and print them; return 0.

    Args:
        arguments: arguments of the command line.

    Raises:
        ConfigError: a key is invalid, or a table does not exist.
        DataError: a table cannot be read. Also raised after the report is written and printed, if a threshold such as
            `data.max_bad_fraction` or `max_leakage` is exceeded.
    """
    problems = [
        *broken_rules(config),
        *preflight.check_files(config.data),
        *name_problems(config.name),
        *leaks(plain(config)),
    ]
    if problems:
        raise ConfigError("\n".join(problems))
    splits = open_splits(config.data, Path(config.output_dir))
    folder = create_run_folder(config.output_dir, "check_data", config.name)
    write_text(folder / "config.yaml", to_yaml(config))
    record = RunRecord(folder)
    record.start(arguments)
    # Imported only after the tables are opened, because torch takes seconds to import.
    from clip_exp.checks.check import run

    try:
        report, verdicts = run(splits, config, folder, command_line("check-data", arguments))
    except BaseException as error:
        record.finish("failed", error=str(error).splitlines()[:20])
        raise
    record.finish("finished", exit_code=report["exit_code"])
    errors = [verdict for verdict in verdicts if verdict.level == "error"]
    if config.format is CheckFormat.json:
        print(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        show(report, verdicts, folder, None if errors else _next_command(report, arguments))
    if errors:
        raise DataError("\n".join(f"{verdict.split}: {verdict.text}. {verdict.fix}." for verdict in errors))
    return 0


def _next_command(report: dict[str, Any], arguments: list[str]) -> str:
    """Return the command that trains with the same data and model, and with the overrides that the findings recommend."""
    overrides = [text for text in split_arguments(arguments)[1] if text.partition("=")[0] not in ONLY_HERE]
    given = {text.partition("=")[0] for text in overrides}
    subjects = {verdict["subject"] for verdict in report["verdicts"]}
    advice = {
        "data": "data=csv",  # the default of conf/check_data.yaml
        "model": f"model={report['model']['name']}",
        "data.on_bad_row": "data.on_bad_row=skip" if "bad_rows" in subjects else None,
        "loss.same_caption": "loss.same_caption=positive" if "equal_captions" in subjects else None,
    }
    overrides += [text for key, text in advice.items() if text is not None and key not in given]
    return command_line("train", overrides)


# Summary for the terminal.

MARKS = {Level.error: ("✗", "bold red"), Level.warning: ("!", "yellow"), Level.note: ("·", "dim")}


def show(report: dict[str, Any], verdicts: list[Verdict], folder: Path, next_command: str | None) -> None:
    """Print an overview, the problems, and the paths of the report.

    Args:
        next_command: command to run next; None if the data must be repaired first.
    """
    splits, speed = report["splits"], report["speed"]
    overview = Table("", *splits)
    for column in overview.columns[1:]:
        column.justify = "right"
    for name, value in _FACTS.items():
        overview.add_row(name, *(value(split) for split in splits.values()))
    if speed["samples_per_s"] is not None:
        overview.add_row(f"pairs/s, {loaders(speed['loader_workers'])}", f"{speed['samples_per_s']:,.0f}")
    problems = Table("", "split", "problem", "fix", show_lines=True)
    for column in problems.columns[2:]:
        column.overflow = "fold"
    for verdict in verdicts:
        mark, style = MARKS[verdict.level]
        problems.add_row(Text(mark, style), verdict.split, Text(verdict.text), Text(f"{verdict.fix}."))
    console = Console()
    console.print(overview)
    console.print(problems if verdicts else Text("No problems found.", "green"))
    following = {"Lists": folder, "Open": folder / "report.html"} | ({"Next": next_command} if next_command else {})
    for name, value in following.items():
        console.print(f"{name + ':':7}{value}", soft_wrap=True, highlight=False, markup=False)


def _number(quantiles: dict[str, float] | None, *names: str) -> str:
    return "–" if quantiles is None else " / ".join(f"{quantiles[name]:,.0f}" for name in names)


def _size(split: dict[str, Any]) -> str:
    width, height = (split["sizes"][name] for name in ("width", "height"))
    return "–" if width is None else f"{width['p50']:,.0f} x {height['p50']:,.0f}"


_FACTS: dict[str, Any] = {
    "rows": lambda split: f"{split['rows']:,}",
    "images": lambda split: f"{split['images']:,}",
    "images checked": lambda split: f"{split['images_checked']:,}",
    "bad rows": lambda split: f"{split['bad_rows']['count']:,}",
    "bad images": lambda split: f"{split['bad_images']['count']:,}",
    "median size, pixels": _size,
    "tokens: median / 95 % / max": lambda split: _number(split["captions"]["tokens"], "p50", "p95", "max"),
    "truncated captions": lambda split: f"{split['captions']['truncated']['count']:,}",
    "distinct captions": lambda split: f"{split['captions']['distinct']:,}",
}
