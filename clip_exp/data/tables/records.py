"""Rows from records: mappings from column name to value, as in JSON."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from clip_exp.data.tables.captions import list_array
from clip_exp.data.tables.reader import (
    BadRows,
    BadValue,
    RowBlock,
    TableOptions,
    absent,
    conventional,
    is_optional,
    no_column,
    value_of,
)

_BLOCK_ROWS = 1 << 12
_BLOCK_BYTES = 64 << 20  # limit for the records of a block, because a filter may use texts of megabytes
MAX_LINE = 16 << 20  # bytes; a longer line usually means another kind of file


class Records:
    """Collector of records, which makes blocks of rows of them.

    Args:
        options: columns to read.
        bad: record of the bad rows.
        word: word of the format for a column.
    """

    def __init__(self, options: TableOptions, bad: BadRows, word: str = "key") -> None:
        self.requested, self.bad, self.word = options.requested, bad, word
        self._extra = NativeColumns(options.filtered)
        self._seen = False
        self._clear()

    def add(self, number: int, record: Mapping[str, Any], size: int, **numbers: Any) -> None:
        """Add a record.

        Args:
            number: number of its line or entry, from 1.
            record: values by column name.
            size: its size in bytes, approximately.
            numbers: other numbers of its row, see `RowBlock.numbers`.

        Raises: BadValue if a requested value is missing or not valid.
        """
        if not self._seen:
            self._seen, self.requested = True, conventional(self.requested, record)
        values = [self._value(setting, name, record) for setting, name in self.requested.items()]
        self._values.append(values)
        self._records.append(self._extra.of_record(record))
        self._lines.append(number)
        for name, value in numbers.items():
            self._numbers.setdefault(name, []).append(value)
        self._bytes += size

    @property
    def is_full(self) -> bool:
        """True if the records should be taken as a block."""
        return len(self._lines) >= _BLOCK_ROWS or self._bytes >= _BLOCK_BYTES

    def __len__(self) -> int:
        return len(self._lines)

    def block(self) -> RowBlock:
        """Return the records as a block, and forget them."""
        columns = dict(zip(self.requested, map(list_array, zip(*self._values, strict=True)), strict=True))
        numbers = {name: np.array(values, dtype=np.int64) for name, values in self._numbers.items()}
        block = RowBlock(
            columns, {"lines": np.array(self._lines, dtype=np.int64), **numbers}, self._extra.arrays(self._records)
        )
        self._clear()
        return block

    def unknown_column(self) -> str | None:
        """Return the end of a message that starts with the file, if the filter names a column that no record had; else None."""
        missing = self._extra.never_seen()
        return None if missing is None else no_column(missing, "filter", self._extra.seen)

    def _clear(self) -> None:
        self._values: list[list[str | list[str]]] = []
        self._records: list[dict[str, Any]] = []
        self._lines: list[int] = []
        self._numbers: dict[str, list[Any]] = {}
        self._bytes = 0

    def _value(self, setting: str, name: str, record: Mapping[str, Any]) -> str | list[str]:
        if name in record or is_optional(setting):
            return value_of(setting, name, record.get(name))
        raise BadValue(absent(setting, name)[0], no_column(name, setting, record, self.word).rstrip("."))


def parse_object(text: bytes) -> dict[str, Any]:
    """Parse a JSON object.

    Raises: BadValue.
    """
    if len(text) > MAX_LINE:
        raise BadValue("line too long", f"the line has more than {MAX_LINE >> 20} MB")
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
