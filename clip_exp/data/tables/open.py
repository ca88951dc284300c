"""From what the configuration names to one table: files found, their formats told apart, their rows put together."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from clip_exp.config.schema import DataConfig, OnBadRow
from clip_exp.data.tables.delimited import DelimitedReader
from clip_exp.data.tables.options import TableOptions
from clip_exp.data.tables.reader import Reader
from clip_exp.data.tables.table import PairTable, Part
from clip_exp.errors import ConfigError, DataError

log = logging.getLogger(__name__)


def open_table(
    tables: str | Path | Sequence[str | Path],
    options: TableOptions,
    *,
    image_root: str | Path | None = None,
    index_dir: Path | None = None,
) -> PairTable:
    """One table of all rows of one or several files.

    Args:
        tables: files, globs and brace patterns (`{000..009}`), of CSV, TSV, JSON Lines, Parquet, or WebDataset shards; shards
            and the others do not mix.
        options: what to read, and how.
        image_root: where relative image paths start from; None: each file's own folder.
        index_dir: where indexes are kept (`tables.index`); None: the rows are held in memory.

    Raises:
        ConfigError: a file does not exist, or an argument makes no sense.
        DataError: a column is missing, a row is bad, or there are no rows.
    """
    files = [tables] if isinstance(tables, str | Path) else list(tables)
    if not files:
        raise ConfigError("No table was given: set data.train to a CSV file or a list of them.")
    blocks: list[pa.RecordBatch] = []
    lines: list[np.ndarray] = []
    parts: list[Part] = []
    start = 0
    for file in map(_existing, files):
        if start == options.max_rows:
            break
        reader = open_reader(file, options)
        rows = 0
        for block in reader.blocks():
            room = len(block) if options.max_rows is None else min(len(block), options.max_rows - start - rows)
            columns = {setting: array.slice(0, room) for setting, array in block.columns.items()}
            blocks.append(pa.RecordBatch.from_arrays(list(columns.values()), list(columns)))
            lines.append(block.lines[:room])
            rows += room
            if start + rows == options.max_rows:
                break
        bad = dict(reader.bad.counts)
        if bad:
            log.warning("%s: %d bad rows were left out (data.on_bad_row=skip).", file, sum(bad.values()))
        if not rows:
            left_out = f" ({sum(bad.values())} bad ones were left out)" if bad else ""
            raise DataError(f"{file} has no rows{left_out}: it needs a row per image-text pair below its header.")
        root = Path(image_root) if image_root is not None else file.parent
        parts.append(Part(file, root, start, rows, bad, tuple(reader.bad.examples), reader.bad.unit))
        start += rows
    table = pa.Table.from_batches(blocks).combine_chunks()
    arrays = {name: table[name].combine_chunks() for name in table.column_names}
    return PairTable(
        arrays["image_key"],
        arrays.get("caption_key"),
        arrays.get("label_key"),
        np.concatenate(lines),
        tuple(parts),
    )


def open_reader(file: Path, options: TableOptions) -> Reader:
    """The reader of a file's format, by its name: .jsonl, .parquet, .tar; anything else is delimited text."""
    return DelimitedReader(file, options)


def read_table(
    tables: str | Path | Sequence[str | Path], *, image_root: str | Path | None = None, **options: Any
) -> PairTable:
    """`open_table` in memory, by keywords of `TableOptions`."""
    if "on_bad_row" in options:
        options["on_bad_row"] = OnBadRow(options["on_bad_row"])
    return open_table(tables, TableOptions(**options), image_root=image_root)


def open_configured(
    config: DataConfig,
    tables: str | Sequence[str],
    *,
    label_key: str | None = None,
    max_rows: int | None = None,
    index_dir: Path | None = None,
) -> PairTable:
    """`open_table` as a run's configuration says."""
    options = TableOptions.of(config, label_key=label_key, max_rows=max_rows)
    return open_table(tables, options, image_root=config.image_root, index_dir=index_dir)


def _existing(table: str | Path) -> Path:
    path = Path(table)
    if "://" in str(table):
        raise ConfigError(f"{table} is an address: tables are read from files; download it first.")
    if not path.is_file():
        what = "is not a file" if path.exists() else "does not exist"
        raise ConfigError(
            f"The table {path} {what} (seen from {Path.cwd()}): set data.train or data.val to a CSV file."
        )
    return path
