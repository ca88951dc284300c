"""From what the configuration names to one table: files found, their formats told apart, their rows put together."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clip_exp.config.data_schema import DataConfig, OnBadRow
from clip_exp.data.tables.formats import check_one_kind
from clip_exp.data.tables.index import open_index
from clip_exp.data.tables.index_writer import TableSource, progress_of
from clip_exp.data.tables.options import TableOptions
from clip_exp.data.tables.paths import expand
from clip_exp.data.tables.scan import Scan, ScannedFile
from clip_exp.data.tables.table import PairTable, Part, RowsInMemory, StoredRows
from clip_exp.errors import CheckpointError

log = logging.getLogger(__name__)

_MEMORY_BYTES = 64 << 20  # of files that may be held in memory where an index was wanted but cannot be written


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
        CheckpointError: the index of a large table cannot be written.
    """
    files = expand(tables)
    check_one_kind(files)
    # Absolute: a process that changes its working directory reads the same pictures.
    roots = [(Path(image_root) if image_root is not None else file.parent).absolute() for file in files]
    source = TableSource(files, roots, options)
    rows, read = _in_memory(source) if index_dir is None else _in_index(source, index_dir)
    parts: list[Part] = []
    for file, root, found in zip(files, roots, read, strict=False):  # max_rows may have ended the reading early
        if found.bad:
            kinds = ", ".join(f"{count:,} {reason}" for reason, count in found.bad.items())
            log.warning("%s: %d bad rows were left out: %s.", file, sum(found.bad.values()), kinds)
        if found.empty_captions:
            log.warning("%s: %d of %d captions are empty or blank.", file, found.empty_captions, found.rows)
        if found.unlike:
            level = logging.WARNING if any(each.count for each in found.unlike) else logging.INFO
            described = "; ".join(each.describe(found.unit) for each in found.unlike)
            log.log(level, "%s: values that match nothing in the filter: %s.", file, described)
        start = parts[-1].start + parts[-1].rows if parts else 0
        parts.append(_part(file, root, start, found))
    return PairTable(rows, tuple(parts))


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


def _in_memory(source: TableSource) -> tuple[StoredRows, list[ScannedFile]]:
    with progress_of(source.files) as advance:
        scan = Scan(source.files, source.options, advance)
        batches = list(scan.batches())
    return RowsInMemory(batches, [file.rows for file in scan.read], source.roots), scan.read


def _in_index(source: TableSource, index_dir: Path) -> tuple[StoredRows, list[ScannedFile]]:
    try:
        return open_index(source, index_dir)
    except OSError as error:
        message = f"The index of {source.files[0]} cannot be written to {index_dir}: {error.strerror or error}"
        if sum(file.stat().st_size for file in source.files) >= _MEMORY_BYTES:
            raise CheckpointError(f"{message}. Set output_dir to a folder that can be written to.") from error
        log.warning("%s; its rows are held in memory.", message)
        return _in_memory(source)


def _part(file: Path, root: Path, start: int, found: ScannedFile) -> Part:
    return Part(
        file.absolute(), root, start, found.rows, found.bad, found.bad_examples, found.unit,
        seen=found.seen, bytes=found.stamp.bytes, digest=found.digest,
        empty_captions=found.empty_captions, unlike=found.unlike,
    )  # fmt: skip
