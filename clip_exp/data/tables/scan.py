"""The rows of several files in batches of a constant number of rows, and an account of each file."""

import hashlib
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from clip_exp.data.tables import filters
from clip_exp.data.tables.columns import bool_array, count_blank, string_buffers, trimmed
from clip_exp.data.tables.comparisons import Unlike, joined
from clip_exp.data.tables.formats import open_reader
from clip_exp.data.tables.reader import FileStamp, Reader, RowBlock, TableOptions
from clip_exp.errors import DataError
from clip_exp.progress import progress

log = logging.getLogger(__name__)

BATCH_ROWS = 1 << 16
_BAR_FROM = 64 << 20  # bytes; smaller tables are read before a bar is seen


class RowBatch(NamedTuple):
    """`BATCH_ROWS` rows, or the last of a table."""

    columns: pa.RecordBatch  # LargeString, by key of the configuration
    lines: np.ndarray  # int64 [rows]
    members: np.ndarray | None  # int64 [rows, 2]


@dataclass(frozen=True)
class ScannedFile:
    """What was found in a file."""

    path: Path
    stamp: FileStamp
    rows: int
    seen: int  # bad rows and those that the filter leaves out included
    digest: str
    bad: dict[str, int]
    bad_examples: tuple[tuple[int, str], ...]
    unit: str
    empty_captions: int  # of `rows`, blank ones included
    unlike: tuple[Unlike, ...]  # values that the filter could not compare


class Scan:
    """Reads files one after the other, once.

    Args:
        files: existing ones.
        options: what to read; reading stops at `max_rows`, and files that come after are not opened.
        advance: is told the bytes that were read since the last call.

    Attributes:
        read: of the files that are done.
    """

    def __init__(self, files: Sequence[Path], options: TableOptions, advance: Callable[[int], None]) -> None:
        self.files, self.options, self.advance = files, options, advance
        self.read: list[ScannedFile] = []
        self._filter = None if options.filter is None else filters.parse(options.filter)
        self._rows = 0

    def batches(self) -> Iterator[RowBatch]:
        """All rows.

        Raises: DataError, ConfigError; see `tables.open`.
        """
        yield from map(_as_batch, _rebatch(self._blocks()))
        if not self._rows:
            which = f"{self.files[0]}{' and the others' * (len(self.files) > 1)}"
            unlike = "; ".join(each.describe(file.unit) for file in self.read[:1] for each in file.unlike)
            raise DataError(
                f"{which}: no row passes data.filter={self.options.filter}.{f' Values that match nothing: {unlike}.' * bool(unlike)}"
                if any(file.seen for file in self.read)
                else f"{which}: there are no rows. It takes a row per image-text pair."
            )

    def _blocks(self) -> Iterator[RowBlock]:
        for file in self.files:
            if self._rows == self.options.max_rows:
                return
            yield from self._blocks_of(file)

    def _blocks_of(self, file: Path) -> Iterator[RowBlock]:
        stamp = FileStamp.of_table(file, len(self.files))
        reader, digest = open_reader(file, self.options), _Digest()
        before, found, empty_captions = self._rows, 0, 0
        unlike: list[Unlike] = []
        for block in self._advancing(reader, stamp.bytes):
            found += len(block)
            kept = self._kept(block, unlike)
            if len(kept):
                digest.update(kept)
                empty_captions += count_blank(kept.columns["caption_key"]) if "caption_key" in kept.columns else 0
                self._rows += len(kept)
                yield kept
            if self._rows == self.options.max_rows:
                break
        bad = reader.bad
        if not found and (bad.counts or len(self.files) == 1):
            left_out = f" ({bad.counts.total()} bad ones were left out)" if bad.counts else ""
            raise DataError(f"{file} has no rows{left_out}: it needs a row per image-text pair.")
        if not found:  # Spark and its like write such parts
            log.warning("%s has no rows.", file)
        if FileStamp.of_table(file, len(self.files)) != stamp:
            raise DataError(f"{file} has changed while it was read: start again when it is complete.")
        rows, seen = self._rows - before, found + bad.counts.total()
        self.read.append(
            ScannedFile(
                file, stamp, rows, seen, digest.hex(), dict(bad.counts), tuple(bad.examples), bad.unit,
                empty_captions, tuple(joined(unlike)),
            )
        )  # fmt: skip

    def _advancing(self, reader: Reader, size: int) -> Iterator[RowBlock]:
        told = 0
        for block in reader.blocks():
            self.advance(reader.bytes_read - told)
            told = reader.bytes_read
            yield block
        self.advance(size - told)

    def _kept(self, block: RowBlock, unlike: list[Unlike]) -> RowBlock:
        if self._filter is not None:
            mask, found = self._filter.select(block.extra or {}, block.lines)
            unlike += found
            if not mask.all():
                block = _filtered(block, mask)
        if "label_key" in block.columns:
            columns = {**block.columns, "label_key": trimmed(block.columns["label_key"])}
            block = RowBlock(columns, block.lines, block.members)
        room = len(block) if self.options.max_rows is None else self.options.max_rows - self._rows
        return _slice(block, 0, room)


def progress_of(files: Sequence[Path]) -> AbstractContextManager[Callable[[int], None]]:
    """A bar on the terminal for tables that take a while; to be told the bytes that are read."""
    size = sum(file.stat().st_size for file in files)
    if size < _BAR_FROM or not sys.stderr.isatty():
        return nullcontext(lambda done: None)
    return progress(size, f"bytes of {files[0].name}")


class _Digest:
    """Of rows, however they are cut into blocks."""

    def __init__(self) -> None:
        self._hashes: dict[str, Any] = {}

    def update(self, block: RowBlock) -> None:
        for name, array in block.columns.items():
            starts, data = string_buffers(array)
            self._add(f"{name} lengths", np.diff(starts))
            self._add(name, data[starts[0] : starts[-1]])
        if block.members is not None:
            self._add("members", np.ascontiguousarray(block.members))

    def hex(self) -> str:
        parts = [f"{name} {self._hashes[name].hexdigest()}\n" for name in sorted(self._hashes)]
        return hashlib.sha256("".join(parts).encode()).hexdigest()

    def _add(self, name: str, values: np.ndarray) -> None:
        self._hashes.setdefault(name, hashlib.sha256()).update(values.data)


def _rebatch(blocks: Iterable[RowBlock]) -> Iterator[RowBlock]:
    pending: list[RowBlock] = []
    rows = 0
    for block in blocks:
        pending.append(block)
        rows += len(block)
        if rows >= BATCH_ROWS:
            whole = _concat(pending)
            full = rows - rows % BATCH_ROWS
            for start in range(0, full, BATCH_ROWS):
                yield _slice(whole, start, BATCH_ROWS)
            pending, rows = [_slice(whole, full, rows)], rows - full
    if rows:
        yield _concat(pending)


def _concat(blocks: Sequence[RowBlock]) -> RowBlock:
    if len(blocks) == 1:
        return blocks[0]
    columns = {name: pa.concat_arrays([block.columns[name] for block in blocks]) for name in blocks[0].columns}
    members = [block.members for block in blocks if block.members is not None]
    lines = np.concatenate([block.lines for block in blocks])
    return RowBlock(columns, lines, np.concatenate(members) if members else None)


def _slice(block: RowBlock, start: int, rows: int) -> RowBlock:
    if start == 0 and rows >= len(block):
        return block
    columns = {name: array.slice(start, rows) for name, array in block.columns.items()}
    members = None if block.members is None else block.members[start : start + rows]
    return RowBlock(columns, block.lines[start : start + rows], members)


def _filtered(block: RowBlock, mask: np.ndarray) -> RowBlock:
    chosen = bool_array(mask)
    columns = {name: array.filter(chosen) for name, array in block.columns.items()}
    members = None if block.members is None else block.members[mask]
    return RowBlock(columns, block.lines[mask], members)


def _as_batch(block: RowBlock) -> RowBatch:
    columns = pa.RecordBatch.from_arrays(list(block.columns.values()), list(block.columns))
    return RowBatch(columns, block.lines, block.members)
