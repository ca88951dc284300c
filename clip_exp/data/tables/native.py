"""Columns of a filter, from records whose values have types of their own (JSON)."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from clip_exp.data.tables import filters
from clip_exp.data.tables.options import TableOptions


class NativeColumns:
    """Arrow columns of the keys that a filter names, and an account of the keys that were seen.

    Args:
        names: that the filter names.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.names = sorted(names)
        self.seen: dict[str, None] = {}  # keys of the first record
        self._missing = set(self.names)

    @classmethod
    def of(cls, options: TableOptions) -> "NativeColumns":
        return cls(filters.parse(options.filter).names if options.filter else ())

    def of_record(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """What the filter looks at of a record; the rest, an embedding maybe, need not be kept."""
        if not self.names:
            return {}
        if not self.seen:
            self.seen = dict.fromkeys(record)
        self._missing -= record.keys()
        return {name: record[name] for name in self.names if name in record}

    def arrays(self, records: Sequence[Mapping[str, Any]]) -> dict[str, pa.Array] | None:
        """A column per name, of what `of_record` gave; a key that is missing is null. None without names."""
        return {name: typed_array([record.get(name) for record in records]) for name in self.names} or None

    def never_seen(self) -> str | None:
        """A name that no record had."""
        return min(self._missing) if self._missing and self.seen else None


def typed_array(values: Sequence[Any]) -> pa.Array:
    """Truth values, whole numbers, numbers, strings or lists of strings where all values are; else text, written as JSON."""
    kinds = {type(value) for value in values} - {type(None)}
    try:
        if kinds == {float} or kinds == {int, float}:
            return pa.array([None if value is None or math.isnan(value) else float(value) for value in values])
        if kinds == {str}:
            return pa.array(values, pa.large_string())
        if len(kinds) <= 1 and kinds != {dict}:
            return pa.array(values)
    except (pa.ArrowException, ValueError, OverflowError, TypeError):
        pass  # a number beyond 64 bits, a list of unlike things, half a surrogate pair
    return pa.array([None if value is None else _as_text(value) for value in values], pa.large_string())


def _as_text(value: Any) -> str:
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else json.dumps(value)
