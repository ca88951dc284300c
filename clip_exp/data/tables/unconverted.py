"""Report of values that a filter could not compare: `1,024` is not a number, so `width >= 256` does not match its row."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clip_exp.data.tables.columns import bool_array, bool_numpy

_SHOWN = 40  # characters of an example


@dataclass(frozen=True)
class UnconvertedValues:
    """Values of a column that could not be converted to the kind with which a filter compares it.

    Missing values are counted separately: an empty cell is expected to match nothing, and an unreadable one is probably
    an error.
    """

    column: str  # name of the column
    kind: str  # kind of the comparison: numbers, text, truth values
    count: int  # values of another kind
    missing: int  # null, NaN, and blank cells in a comparison that is not of text
    example: str  # first of the `count` values, shortened
    line: int  # line in which its row starts

    def describe(self, unit: str) -> str:
        """Return a short description for messages.

        Args:
            unit: unit of `line`: line, row or sample.
        """
        counted = [f"{self.missing:,} missing"] if self.missing else []
        if self.count:
            counted.insert(0, f"{self.count:,} not {self.kind}, such as {self.example!r} in {unit} {self.line}")
        return f"{self.column} ({', '.join(counted)})"


def find_unconverted(name: str, kind: str, column: pa.Array, lost: np.ndarray, lines: np.ndarray) -> UnconvertedValues:
    """Describe the values of a block of rows that could not be converted.

    Args:
        name: name of the column.
        kind: kind of the comparison.
        column: column as stored in the file; texts are large strings.
        lost: bool [rows], True for at least one value that is missing or could not be converted.
        lines: line in which each row starts.
    """
    values, places = column.filter(bool_array(lost)), lines[lost]
    present = bool_numpy(pc.is_valid(values))
    if pa.types.is_large_string(values.type):
        present &= bool_numpy(pc.not_equal(pc.utf8_trim_whitespace(values), "").fill_null(False))
    count = int(present.sum())
    if not count:
        return UnconvertedValues(name, kind, 0, len(values), "", 0)
    first = int(np.flatnonzero(present)[0])
    example = str(values[first].as_py())
    example = example if len(example) <= _SHOWN else example[:_SHOWN] + "…"
    return UnconvertedValues(name, kind, count, len(values) - count, example, int(places[first]))


def merge_unconverted(found: Iterable[UnconvertedValues]) -> list[UnconvertedValues]:
    """Merge the results of consecutive blocks or files to one per column and kind."""
    merged: dict[tuple[str, str], UnconvertedValues] = {}
    for new in found:
        before = merged.setdefault((new.column, new.kind), replace(new, count=0, missing=0))
        first = before if before.count else new
        count, missing = before.count + new.count, before.missing + new.missing
        merged[new.column, new.kind] = replace(first, count=count, missing=missing)
    return list(merged.values())


def as_json(found: Iterable[UnconvertedValues]) -> dict[str, dict[str, Any]]:
    """Return JSON values by column, for a summary or the settings of an evaluation."""
    by_column: dict[str, dict[str, Any]] = {}
    for each in found:
        values = {name: value for name, value in asdict(each).items() if name not in ("column", "line")}
        if not each.count:
            del values["example"]
        by_column[each.column if each.column not in by_column else f"{each.column} ({each.kind})"] = values
    return by_column
