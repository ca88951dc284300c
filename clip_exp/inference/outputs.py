"""Output of results as a table, JSON or CSV, on the terminal or in a file. Does not import torch."""

import io
import json
import os
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from clip_exp.config.commands import OutputConfig, OutputFormat
from clip_exp.errors import CheckpointError, ConfigError
from clip_exp.loading import ModelSource
from clip_exp.storage import TextWriter, atomic_file

ENDINGS = {".csv": OutputFormat.csv, ".json": OutputFormat.json, ".txt": OutputFormat.table}
# Endings of files that usually contain features
ARRAYS = (".npy", ".npz", ".pt", ".pth", ".h5", ".hdf5", ".parquet", ".safetensors", ".pkl")
WIDE = 100_000  # width of tables without a terminal, characters


@dataclass(frozen=True)
class Report:
    """Result of a command."""

    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]  # rows with the same first column form a section
    document: dict[str, Any]  # the same values and the model, for JSON


def check_output(config: OutputConfig) -> None:
    """Check the output file.

    Raises:
        ConfigError: `output` is a folder, its folder does not exist, or its ending is unknown or that of another format.
    """
    if config.output is None:
        return
    path = Path(config.output).expanduser()
    if path.is_dir() or not path.parent.is_dir():
        what = "is a folder" if path.is_dir() else f"cannot be written: {path.parent} is not a folder"
        raise ConfigError(f"output={config.output} {what}.")
    ending = path.suffix.lower()
    if ending not in ENDINGS:
        given = f"has the unknown ending {path.suffix}" if ending else "has no ending"
        known = " or ".join(f"{known} ({chosen})" for known, chosen in ENDINGS.items())
        features = " For features of images and texts, use clip-exp embed." if ending in ARRAYS else ""
        raise ConfigError(f"output={config.output} {given}: give a file that ends with {known}.{features}")
    if config.format not in (None, ENDINGS[ending]):
        raise ConfigError(
            f"output={config.output} has the ending of {ENDINGS[ending]}, but format={config.format}: leave out one of them."
        )


def about(source: ModelSource) -> dict[str, Any]:
    """Return the model and its weights for JSON."""
    return {"model": source.model.name, "weights": str(source.weights.resolve())}


def write(report: Report, config: OutputConfig) -> None:
    """Print a report, or write it atomically.

    Raises:
        CheckpointError: the file cannot be written.
    """
    path = Path(config.output).expanduser() if config.output is not None else None
    chosen = config.format or (ENDINGS[path.suffix.lower()] if path else OutputFormat.table)
    if path is not None:
        text = _render(report, chosen, WIDE)
        try:
            with atomic_file(path) as temporary:
                temporary.write_text(text, encoding="utf-8", errors="surrogateescape", newline="")
        except OSError as error:
            raise CheckpointError(f"output={path} cannot be written: {error.strerror}.") from error
        print(f"written: {path}")
        return
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="surrogateescape")  # file names that are not UTF-8
    try:
        print(_render(report, chosen, Console().width if sys.stdout.isatty() else WIDE), end="", flush=True)
    except BrokenPipeError:  # the reader has closed the pipe, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def number(value: float) -> float:
    """Round a float32 value to its significant digits, without those that float64 adds."""
    return float(f"{value:.7g}")


def _render(report: Report, chosen: OutputFormat, width: int) -> str:
    if chosen is OutputFormat.json:
        return json.dumps(report.document, indent=2, ensure_ascii=False) + "\n"
    text = io.StringIO(newline="")
    if chosen is OutputFormat.csv:
        TextWriter(text).writerows([report.columns, *report.rows])
    else:
        Console(file=text, width=width, color_system=None).print(_table(report))
    return text.getvalue()


def _table(report: Report) -> Table:
    table = Table(*report.columns)
    first = report.rows[0] if report.rows else ()
    for column, value in zip(table.columns, first, strict=False):
        column.overflow = "fold"
        column.justify = "right" if isinstance(value, int | float) else "left"
    before: Any = None
    several = any(row[0] == after[0] for row, after in pairwise(report.rows))
    for row in report.rows:
        if several and before is not None and row[0] != before:
            table.add_section()
        shown = ["" if row[0] == before else row[0], *row[1:]]
        table.add_row(*(Text(f"{cell:.4f}" if isinstance(cell, float) else str(cell)) for cell in shown))
        before = row[0]
    return table
