"""Reader for JSON Lines: one object per line, in UTF-8."""

import codecs
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from clip_exp.config.data import OnBadRow
from clip_exp.data.tables.columns import string_array
from clip_exp.data.tables.reader import (
    BadRows,
    BadValue,
    RowBlock,
    TableOptions,
    absent,
    no_column,
    text_of,
    unreadable,
)
from clip_exp.errors import DataError

_BLOCK_ROWS = 1 << 12
_BLOCK_BYTES = 64 << 20  # limit for the lines of a block, because a filter may use texts of megabytes
_MAX_LINE = 16 << 20  # bytes; a longer line usually means another kind of file
_HEAD = 4096  # bytes by which other kinds of files are recognized
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class JsonLinesReader:
    """`tables.reader.Reader` for JSON Lines.

    Captions and paths must be strings (`reader.text_of`); further columns may also be numbers. Other keys are ignored,
    but no key may appear twice. Blank lines are skipped. `NaN`, which Python writes although it is not valid JSON, is a
    missing number.

    Args:
        path: existing file.
        options: columns and rows to read.
    """

    def __init__(self, path: Path, options: TableOptions) -> None:
        self.path, self.requested = path, options.requested
        self.bad = BadRows(path, options.on_bad_row is OnBadRow.skip)
        self.bytes_read = 0
        self._extra = NativeColumns(options.filtered)

    def blocks(self) -> Iterator[RowBlock]:
        """See `tables.reader.Reader`."""
        try:
            with open(self.path, "rb") as file:
                self._check_kind(file)
                yield from self._blocks(file)
        except OSError as error:
            raise unreadable(self.path, error) from error
        if missing := self._extra.never_seen():
            raise DataError(f"{self.path} {no_column(missing, 'filter', self._extra.seen)}")

    def _check_kind(self, file: BinaryIO) -> None:
        head = file.read(_HEAD)
        start = len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0
        if not head:
            raise DataError(
                f"{self.path} is empty: it must have one JSON object per line, one for each image-text pair."
            )
        if head.startswith(_UTF16) or b"\0" in head[:4]:  # JSON starts with two ASCII characters
            raise DataError(
                f"{self.path} is UTF-16 or UTF-32, but JSON Lines must be UTF-8: convert it (iconv -f utf-16 -t utf-8)."
            )
        head = head[start:]
        if head.lstrip().startswith(b"["):
            raise DataError(
                f"{self.path} is one JSON array, not one object per line: convert it (jq -c '.[]' {self.path.name} > pairs.jsonl)."
            )
        if head.lstrip().partition(b"\n")[0].strip() == b"{":
            raise DataError(
                f"{self.path} has an object that spans several lines: write one object per line (jq -c . {self.path.name} > pairs.jsonl)."
            )
        file.seek(start)

    def _blocks(self, file: BinaryIO) -> Iterator[RowBlock]:
        values: list[list[str]] = []
        records: list[dict[str, Any]] = []
        lines: list[int] = []
        before = self.bytes_read
        for line, text in enumerate(_lines(file), 1):
            self.bytes_read += len(text)
            if text.isspace():
                continue
            try:
                record = parse_object(text)
                values.append([self._text(setting, name, record) for setting, name in self.requested.items()])
            except BadValue as bad:
                self.bad.add(line, bad.reason, bad.detail)
                continue
            records.append(self._extra.of_record(record))
            lines.append(line)
            if len(lines) == _BLOCK_ROWS or self.bytes_read - before >= _BLOCK_BYTES:
                yield self._block(values, records, lines)
                values, records, lines = [], [], []
                before = self.bytes_read
        if lines:
            yield self._block(values, records, lines)

    def _block(self, values: list[list[str]], records: list[dict[str, Any]], lines: list[int]) -> RowBlock:
        columns = dict(zip(self.requested, map(string_array, zip(*values, strict=True)), strict=True))
        return RowBlock(columns, np.array(lines, dtype=np.int64), None, self._extra.arrays(records))

    def _text(self, setting: str, name: str, record: dict[str, Any]) -> str:
        if name in record:
            return text_of(setting, name, record[name])
        raise BadValue(absent(setting, name)[0], no_column(name, setting, record, "key").rstrip("."))


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Yield the lines; of a line that is too long, only the start."""
    while line := file.readline(_MAX_LINE + 1):
        yield line
        while len(line) > _MAX_LINE and not line.endswith(b"\n"):
            line = file.readline(_MAX_LINE + 1) or b"\n"


def parse_object(text: bytes) -> dict[str, Any]:
    """Parse a JSON object.

    Raises: BadValue.
    """
    if len(text) > _MAX_LINE:
        raise BadValue("line too long", f"the line has more than {_MAX_LINE >> 20} MB")
    try:
        value = _DECODER.decode(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadValue("not UTF-8", f"byte {error.start} of the line is not UTF-8 ({error.reason})") from error
    except RecursionError as error:
        raise BadValue("not JSON", "it is nested too deeply") from error
    except ValueError as error:
        raise BadValue("not JSON", f"it is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise BadValue("not an object", f'it is not an object, {{"key": "value"}}, but {text[:40]!r}')
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise BadValue("duplicate key", f"the key {twice!r} appears {names.count(twice)} times")
    return record


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


# Columns of a filter, from records with typed values.


class NativeColumns:
    """Collector of the keys that a filter names, which converts them to Arrow columns.

    Args:
        names: names in the filter.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.names = sorted(names)
        self.seen: dict[str, None] = {}  # keys of the first record
        self._missing = set(self.names)

    def of_record(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Return the keys of a record that the filter uses, so that large values such as embeddings can be dropped."""
        if not self.names:
            return {}
        if not self.seen:
            self.seen = dict.fromkeys(record)
        self._missing -= record.keys()
        return {name: record[name] for name in self.names if name in record}

    def arrays(self, records: Sequence[Mapping[str, Any]]) -> dict[str, pa.Array] | None:
        """Convert results of `of_record` to a column per name, with null for a missing key.

        Return None without names.
        """
        return {name: typed_array([record.get(name) for record in records]) for name in self.names} or None

    def never_seen(self) -> str | None:
        """Return a name that no record had, or None."""
        return min(self._missing) if self._missing and self.seen else None


def typed_array(values: Sequence[Any]) -> pa.Array:
    """Convert values to an array of their type, or to JSON text if they have different types."""
    kinds = {type(value) for value in values} - {type(None)}
    try:
        if kinds == {float} or kinds == {int, float}:
            return pa.array([None if value is None or math.isnan(value) else float(value) for value in values])
        if kinds == {str}:
            return pa.array(values, pa.large_string())
        if len(kinds) <= 1 and kinds != {dict}:
            return pa.array(values)
    except (pa.ArrowException, ValueError, OverflowError, TypeError):
        pass  # a number beyond 64 bits, a list of mixed types, a lone surrogate

    def as_text(value: Any) -> str:
        return value.encode("utf-8", "replace").decode() if isinstance(value, str) else json.dumps(value)

    return pa.array([None if value is None else as_text(value) for value in values], pa.large_string())
