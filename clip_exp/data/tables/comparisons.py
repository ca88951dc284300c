"""Comparisons of Arrow columns with numbers, text and each other; what cannot be compared is null, and there is an account of it."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clip_exp.data.tables.columns import bool_numpy

_WHOLE = r"^[ \t]*[+-]?[0-9]{1,18}[ \t]*$"
_NUMBER = r"^[ \t]*[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?[ \t]*$"


@dataclass(frozen=True)
class Constant:
    """A value that is written in the filter."""

    value: str | float | bool


@dataclass(frozen=True)
class Column:
    """A column of the table."""

    name: str
    values: pa.Array


@dataclass(frozen=True)
class Length:
    """Characters of a text, or entries of a list."""

    column: pa.Array


Operand: TypeAlias = Column | Constant | Length
Converter: TypeAlias = Callable[[pa.Array], pa.Array]
Conversions: TypeAlias = dict[tuple[str, Converter], pa.Array]  # what each column was made into to be compared


def compare(operator: str, left: Operand, right: Operand, conversions: Conversions) -> pa.BooleanArray:
    """`left operator right`, null where a side is missing or is not of the kind that is compared.

    With a truth value, truth values are compared; with a string, text; with a number or a length, numbers. Two columns are
    compared as numbers where one of them holds numbers or their order is asked, else as text.

    Args:
        operator: a comparison of `pyarrow.compute`: equal, less, …
        left, right: at least one column or length.
        conversions: of columns; those that are missing are made and added.
    """
    constant = next((side.value for side in (left, right) if isinstance(side, Constant)), None)
    if isinstance(constant, bool):
        convert: Converter = truths
    elif isinstance(constant, str):
        convert = texts
    elif constant is not None or _are_numbers(operator, left, right):
        convert = numbers
    else:
        convert = texts
    sides = [_converted(side, convert, conversions) for side in (left, right)]
    if pa.float64() in (sides[0].type, sides[1].type):  # Arrow itself refuses whole numbers that float64 rounds
        sides = [pc.cast(side, pa.float64(), safe=False) for side in sides]
    return getattr(pc, operator)(*sides)


def contains(whole: Column, constant: Operand) -> pa.BooleanArray:
    """Whether a text has a part that reads so, or a list an entry that equals it."""
    assert isinstance(constant, Constant)
    column = _plain(whole.values)
    if not _is_list(column.type):
        needle = constant.value if isinstance(constant.value, str) else f"{constant.value}"
        return pc.match_substring(texts(column), needle)
    entries = compare("equal", Column(whole.name, pc.list_flatten(column)), constant, {}).fill_null(False)
    parents = pc.filter(pc.list_parent_indices(column), entries)
    found = np.zeros(len(column), dtype=np.uint8)
    found[np.frombuffer(parents.buffers()[1], dtype=np.int64)[parents.offset :][: len(parents)]] = 1
    hits = pa.Array.from_buffers(pa.uint8(), len(column), [None, pa.py_buffer(found)])
    return pc.if_else(pc.is_valid(column), pc.cast(hits, pa.bool_()), pa.scalar(None, pa.bool_()))


def numbers(column: pa.Array) -> pa.Array:
    """int64 where all numbers are whole and fit, so that identifiers are told apart, else float64; null for what is no number."""
    column = _plain(column)
    kind = column.type
    if pa.types.is_signed_integer(kind) or (pa.types.is_unsigned_integer(kind) and _fits_int64(column)):
        return pc.cast(column, pa.int64())
    if pa.types.is_unsigned_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        values = pc.cast(column, pa.float64(), safe=False)
        return pc.if_else(pc.is_nan(values), pa.scalar(None, pa.float64()), values)
    if not pa.types.is_large_string(kind):
        return pa.nulls(len(column), pa.float64())
    written = pc.if_else(pc.match_substring_regex(column, _NUMBER), column, pa.scalar(None, kind))
    whole = pc.all(pc.match_substring_regex(written, _WHOLE)).as_py()  # nulls do not count
    return pc.cast(pc.utf8_ltrim(pc.utf8_trim_whitespace(written), "+"), pa.int64() if whole else pa.float64())


def texts(column: pa.Array) -> pa.Array:
    """Large strings: numbers, truth values and times as they are written; null for the rest."""
    column = _plain(column)
    if _is_list(column.type) or pa.types.is_nested(column.type) or pa.types.is_binary(column.type):
        return pa.nulls(len(column), pa.large_string())
    return pc.cast(column, pa.large_string())


def truths(column: pa.Array) -> pa.Array:
    """Truth values; of text, true, false, 1 and 0 in any case are some."""
    column = _plain(column)
    if pa.types.is_boolean(column.type):
        return column
    written = pc.utf8_lower(texts(column))
    is_true, is_false = (
        pc.or_kleene(pc.equal(written, word), pc.equal(written, digit))
        for word, digit in (("true", "1"), ("false", "0"))
    )
    return pc.if_else(pc.or_kleene(is_true, is_false), is_true, pa.scalar(None, pa.bool_()))


def _converted(side: Operand, convert: Converter, conversions: Conversions) -> Any:
    if isinstance(side, Constant):
        return pa.scalar(side.value)
    if isinstance(side, Column):
        key = side.name, convert
        if key not in conversions:
            conversions[key] = convert(side.values)
        return conversions[key]
    column = _plain(side.column)
    if _is_list(column.type):
        return convert(pc.cast(pc.list_value_length(column), pa.int64()))
    return convert(pc.cast(pc.utf8_length(texts(column)), pa.int64()))


def _are_numbers(operator: str, left: Operand, right: Operand) -> bool:
    if "equal" != operator != "not_equal":
        return True
    return any(_is_number(side) for side in (left, right))


def _fits_int64(column: pa.Array) -> bool:
    largest = pc.max(column).as_py()
    return largest is None or largest < 1 << 63


def _is_number(side: Operand) -> bool:
    if isinstance(side, Column):
        return pa.types.is_integer(side.values.type) or pa.types.is_floating(side.values.type)
    return isinstance(side, Length)


def _plain(column: pa.Array) -> pa.Array:
    """Without a dictionary, and text of one kind."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_string(column.type) or pa.types.is_string_view(column.type) or pa.types.is_null(column.type):
        return pc.cast(column, pa.large_string())
    return column


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


# The account: `1,024` is no number, so `width >= 256` does not match its row.

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
