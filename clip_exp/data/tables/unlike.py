"""An account of values that a filter could not compare: `1,024` is no number, so `width >= 256` does not match its row."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clip_exp.data.tables.columns import bool_numpy
from clip_exp.data.tables.comparisons import Conversions, Converter, numbers, texts, truths

_KINDS: dict[Converter, str] = {numbers: "numbers", texts: "text", truths: "truth values"}
_SHOWN = 40  # characters of an example


@dataclass(frozen=True)
class Unlike:
    """Values of a column that are not of the kind that a filter compares it with.

    Missing ones are counted apart: that an empty cell matches nothing is what one expects of it, and an unreadable one is a fault.

    Attributes:
        column: its name.
        kind: what it is compared as: numbers, text, truth values.
        count: values that are not of the kind.
        missing: null, NaN, and empty or blank cells where something else than text is wanted.
        example: the first of `count`, shortened.
        line: where its row starts in the file.
    """

    column: str
    kind: str
    count: int
    missing: int
    example: str
    line: int

    def describe(self, unit: str) -> str:
        """Return the account in words.

        Args:
            unit: what `line` counts: line, row, sample.
        """
        counted = [f"{self.missing:,} missing"] if self.missing else []
        if self.count:
            counted.insert(0, f"{self.count:,} not {self.kind}, such as {self.example!r} in {unit} {self.line}")
        return f"{self.column} ({', '.join(counted)})"


def find_unlike(columns: Mapping[str, pa.Array], conversions: Conversions, lines: np.ndarray) -> list[Unlike]:
    """Return the account of a block of rows.

    Args:
        columns: as the file has them.
        conversions: what the filter made of them, null where it could not.
        lines: where each row starts in the file.
    """
    return [
        _unlike(name, _KINDS[convert], columns[name], converted, lines)
        for (name, convert), converted in conversions.items()
        if converted.null_count
    ]


def joined(found: Iterable[Unlike]) -> list[Unlike]:
    """Return one account per column and kind, of blocks or files one after the other."""
    accounts: dict[tuple[str, str], Unlike] = {}
    for new in found:
        before = accounts.setdefault((new.column, new.kind), replace(new, count=0, missing=0))
        first = before if before.count else new
        count, missing = before.count + new.count, before.missing + new.missing
        accounts[new.column, new.kind] = replace(first, count=count, missing=missing)
    return list(accounts.values())


def as_json(found: Iterable[Unlike]) -> dict[str, dict[str, Any]]:
    """Return accounts for a summary or a protocol, by column."""
    by_column: dict[str, dict[str, Any]] = {}
    for each in found:
        values = {name: value for name, value in asdict(each).items() if name not in ("column", "line")}
        if not each.count:
            del values["example"]
        by_column[each.column if each.column not in by_column else f"{each.column} ({each.kind})"] = values
    return by_column


def _unlike(name: str, kind: str, column: pa.Array, converted: pa.Array, lines: np.ndarray) -> Unlike:
    lost = pc.is_null(converted)
    values, places = column.filter(lost), lines[bool_numpy(lost)]
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    present = bool_numpy(pc.is_valid(values))
    if pa.types.is_floating(values.type):
        present[:] = False  # NaN, which libraries write for what is missing
    elif pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        values = pc.cast(pc.ascii_trim_whitespace(values), pa.large_binary())  # readers of Parquet do not check UTF-8
        present &= bool_numpy(pc.not_equal(pc.binary_length(values), 0).fill_null(False))
    count = int(present.sum())
    if not count:
        return Unlike(name, kind, 0, len(values), "", 0)
    first = int(np.flatnonzero(present)[0])
    value = values[first].as_py()
    example = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
    example = example if len(example) <= _SHOWN else example[:_SHOWN] + "…"
    return Unlike(name, kind, count, len(values) - count, example, int(places[first]))
