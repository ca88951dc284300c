"""Opening of tables: expand patterns to files, read them, and return one table of all rows."""

import atexit
import glob
import logging
import os
import re
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from braceexpand import braceexpand

from clip_exp.config.data import DataConfig, Format, OnBadRow
from clip_exp.data.tables.index import TableSource, open_index
from clip_exp.data.tables.layouts import tables_in
from clip_exp.data.tables.reader import TableOptions, folders_in
from clip_exp.data.tables.scan import SHARD, Scan, ScannedFile, progress_of
from clip_exp.data.tables.store import ImageStore
from clip_exp.data.tables.table import PairTable, Part, RowsInMemory, StoredRows
from clip_exp.errors import CheckpointError, ConfigError

log = logging.getLogger(__name__)

_MEMORY_BYTES = 64 << 20  # tables up to this size are read into memory if their index cannot be written


def open_table(
    tables: str | Path | Sequence[str | Path],
    options: TableOptions,
    *,
    image_root: str | Path | None = None,
    index_dir: Path | None = None,
) -> PairTable:
    """Open one or several files as one table.

    Args:
        tables: files, globs and brace patterns (`{000..009}`) of tables, annotation files or WebDataset shards, or folders; see
            `expand`. Shards cannot be combined with the other formats.
        options: columns and rows to read.
        image_root: folder of relative image paths; None: the folder of each file.
        index_dir: parent folder of the indexes (`tables.index`); None: read the rows into memory.

    Raises:
        ConfigError: a file does not exist, or an argument is invalid.
        DataError: a column is missing, a row is bad, or there are no rows.
        CheckpointError: the index of a large table cannot be written.
    """
    files = expand(tables, options.format)
    shard = next(filter(is_shard, files), None)
    table = next((file for file in files if not is_shard(file)), None)
    if shard is not None and table is not None:
        raise ConfigError(
            f"{shard} is a shard and {table} is not: they cannot be read as one table. Use them as separate sources: "
            f"data.train=[{{path: {shard}, weight: 1}}, {{path: {table}, weight: 1}}]."
        )
    # Absolute, so that a process that changes its working directory reads the same images.
    roots = [(Path(image_root) if image_root is not None else _root_of(file)).absolute() for file in files]
    if not any(
        file.is_dir() for file in files
    ):  # the templates of the classes must not change the index of other tables
        options = replace(options, templates=())
    source = TableSource(files, roots, options)
    rows, read = _in_memory(source) if index_dir is None else _in_index(source, index_dir)
    parts: list[Part] = []
    for file, root, found in zip(
        files, roots, read, strict=False
    ):  # with max_rows, the last files may not have been read
        if found.bad:
            kinds = ", ".join(f"{count:,} {reason}" for reason, count in found.bad.items())
            log.warning("%s: %d bad rows were skipped: %s.", file, sum(found.bad.values()), kinds)
        if found.empty_captions:
            log.warning("%s: %d of %d captions are empty or blank.", file, found.empty_captions, found.rows)
        if found.unconverted:
            level = logging.WARNING if any(each.count for each in found.unconverted) else logging.INFO
            described = "; ".join(each.describe(found.unit) for each in found.unconverted)
            log.log(level, "%s: data.filter reads these values as null: %s.", file, described)
        for problem in _several_captions(found, options):
            log.warning("%s: %s", file, problem)
        start = parts[-1].start + parts[-1].rows if parts else 0
        parts.append(Part(**{**vars(found), "path": file.absolute()}, root=root, start=start))
    return PairTable(rows, tuple(parts))


def _root_of(file: Path) -> Path:
    return file if file.is_dir() else file.parent


def _several_captions(found: ScannedFile, options: TableOptions) -> Iterator[str]:
    """Yield a message for each way in which most captions of a file seem to be several captions."""
    if found.list_captions > found.rows / 2 and not options.caption_list:
        yield (
            f"{found.list_captions:,} of {found.rows:,} captions look like a list of captions, and are read as one text each: "
            "caption_list=true reads them as several captions."
        )
    if found.captions_with_lines > found.rows / 2 and not options.caption_lines:
        yield (
            f"{found.captions_with_lines:,} of {found.rows:,} captions have several lines, and are read as one text each: "
            "caption_lines=true reads each line as a caption."
        )


def read_table(
    tables: str | Path | Sequence[str | Path], *, image_root: str | Path | None = None, **options: Any
) -> PairTable:
    """Open a table in memory, with the fields of `TableOptions` as keyword arguments."""
    if "on_bad_row" in options:
        options["on_bad_row"] = OnBadRow(options["on_bad_row"])
    return open_table(tables, TableOptions(**options), image_root=image_root)


def open_configured(
    config: DataConfig,
    tables: str | Sequence[str],
    *,
    label_key: str | None = None,
    columns: Sequence[str] = (),
    held_out: bool = False,
    max_rows: int | None = None,
    index_dir: Path | None = None,
) -> PairTable:
    """Open a table with the options of a data configuration.

    Args:
        held_out: open the images that `data.val_fraction` holds out, instead of all others.
    """
    header = config.header
    options = TableOptions(
        image_key=config.image_key,
        caption_key=tuple(config.caption_key) if isinstance(config.caption_key, list) else config.caption_key,
        label_key=label_key,
        columns=tuple(columns),
        caption_list=config.caption_list,
        caption_lines=config.caption_lines,
        format=config.format,
        templates=tuple(config.templates),
        val_fraction=config.val_fraction,
        val_seed=config.val_seed,
        held_out=held_out,
        header=tuple(header) if isinstance(header, list) else header,
        separator=config.separator,
        encoding=config.encoding,
        on_bad_row=config.on_bad_row,
        filter=config.filter,
        max_rows=max_rows,
    )
    return open_table(tables, options, image_root=config.image_root, index_dir=index_dir)


def _in_memory(source: TableSource) -> tuple[StoredRows, list[ScannedFile]]:
    store = ImageStore(Path(tempfile.gettempdir()) / f"clip_exp-images-{os.getpid()}-{uuid.uuid4().hex}")
    atexit.register(store.path.unlink, missing_ok=True)
    try:
        with progress_of(source.files) as advance, store:
            scan = Scan(source.files, source.options, advance, store.add)
            blocks = list(scan.blocks())
    except OSError as error:
        raise CheckpointError(
            f"The images of {source.files[0]} cannot be copied to {store.path.parent}: {error.strerror or error}. Free space there, or set "
            "TMPDIR to another folder."
        ) from error
    images = store.path if store.path.exists() else None
    return RowsInMemory(blocks, [file.rows for file in scan.read], source.roots, images), scan.read


def _in_index(source: TableSource, index_dir: Path) -> tuple[StoredRows, list[ScannedFile]]:
    try:
        return open_index(source, index_dir)
    except OSError as error:
        message = f"The index of {source.files[0]} cannot be written to {index_dir}: {error.strerror or error}"
        if sum(file.stat().st_size for file in source.files) >= _MEMORY_BYTES:
            raise CheckpointError(f"{message}. Set output_dir to a writable folder.") from error
        log.warning("%s; reading its rows into memory.", message)
        return _in_memory(source)


# Expansion of paths, globs and brace patterns.

_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)")
MAX_FILES = 1_000_000  # files per pattern; {0..999999999} is probably a mistake
_LISTED = 3  # problems shown in a message


def expand(tables: str | Path | Sequence[str | Path], layout: Format = Format.auto) -> list[Path]:
    """Expand patterns to files, in the given order. The files of a glob are sorted by name.

    A folder is replaced by its tables (`tables.layouts`), unless its images are the data.

    Args:
        tables: one or several paths, globs (`shards/*.tar`, `**` for any folders) and brace patterns (`{0000..0019}`,
            `{a,b}`), which may contain globs. If a file has the name of a pattern, it is that file.
        layout: `data.format`.

    Raises: ConfigError for a missing file, a path that is not a file, a glob without matches, and a file that is named
        twice.
    """
    named = [tables] if isinstance(tables, str | Path) else list(tables)
    files: list[Path] = []
    problems: list[str] = []
    for entry in named:
        if not isinstance(entry, str | Path):
            raise ConfigError(f"{entry!r} is not the path of a table.")
        for pattern in _braces(str(entry)):
            found = tables_in(Path(pattern), layout) if os.path.isdir(pattern) else _files(pattern)
            files += found
            problems += [] if found else [_missing(pattern)]
    if problems:
        more = f"\n… and {len(problems) - _LISTED} more." if len(problems) > _LISTED else ""
        raise ConfigError("\n".join(problems[:_LISTED]) + more)
    if not files:
        raise ConfigError(
            "No table is given: set a file, a pattern (shards/*.tar, {0000..0019}.tar) or a list of them."
        )
    seen: dict[str, Path] = {}
    for file in files:  # the rows of a file that is named twice would be seen twice per epoch
        real = os.path.realpath(file)
        if real in seen:
            same = "" if seen[real] == file else f" (it is {seen[real]})"
            raise ConfigError(
                f"The table {file} is named twice{same}: name it once. To train on it more often, make it a source with a weight."
            )
        seen[real] = file
    return files


def _braces(entry: str) -> list[str]:
    entry = unquote(urlsplit(entry).path) if entry.startswith("file://") else entry
    if "://" in entry:
        raise ConfigError(f"{entry} is a URL: download it first, because tables are read from files.")
    path = os.path.expanduser(entry)
    if "{" not in path or os.path.lexists(path):
        return [path]
    try:
        large = any(abs(int(last) - int(first)) >= MAX_FILES for first, last in _RANGE.findall(path))
        names = [] if large else list(islice(braceexpand(path, escape=False), MAX_FILES + 1))
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{entry} is not a valid pattern: write {{0000..0019}} or {{a,b}}, and close each brace."
        ) from error
    if large or len(names) > MAX_FILES:
        raise ConfigError(f"{entry} names more than {MAX_FILES:,} files.")
    return names


def _files(pattern: str) -> list[Path]:
    """Return the files that match a path or a glob."""
    if os.path.isfile(pattern):
        return [Path(pattern)]
    if not glob.has_magic(pattern):
        return []
    # A set, because a pattern with two `**` finds a file several times.
    return sorted({Path(name) for name in _glob(pattern) if os.path.isfile(name)})


def _glob(pattern: str) -> Iterator[str]:
    """Yield the matches of a glob like `glob.iglob`, which would follow cyclic links forever."""
    if pattern.endswith(f"{os.sep}**"):
        pattern = os.path.join(pattern, "*")
    head, found, rest = pattern.partition(f"**{os.sep}")
    if not found or not (head.endswith(os.sep) or not head):
        yield from glob.iglob(pattern)
        return
    for top in sorted(glob.iglob(head)) if head else [os.curdir]:
        for folder, _ in folders_in(top):
            yield from _glob(os.path.join(glob.escape(folder), rest))


def _missing(pattern: str) -> str:
    if os.path.isdir(pattern):
        return f"The folder {pattern} has neither tables nor images."
    if os.path.lexists(pattern):
        why = "is not a regular file" if os.path.exists(pattern) else "is a broken link"
        return f"The table {pattern} {why}."
    verb = "matches no file" if glob.has_magic(pattern) else "does not exist"
    return f"The table {pattern} {verb} (working directory: {Path.cwd()})."


def is_shard(path: Path) -> bool:
    """Return True if the file name is that of a WebDataset shard."""
    return path.suffix.lower() in SHARD
