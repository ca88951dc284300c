"""Row filters: `data.filter="width >= 256 and similarity > 0.28 and 'dog' in title"`.

The syntax is a subset of Python: comparisons, `and`, `or`, `not`, `in`, `len(column)`, numbers, strings, True, False
and column names. A column name that is not a Python identifier is written in backticks, as in pandas. The text is
parsed by Python's parser and never executed.
"""

import ast
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import reduce
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clip_exp.data.tables.columns import bool_array, bool_numpy
from clip_exp.errors import ConfigError

_OPERATORS: dict[type[ast.cmpop], str] = {
    ast.Eq: "equal",
    ast.NotEq: "not_equal",
    ast.Lt: "less",
    ast.LtE: "less_equal",
    ast.Gt: "greater",
    ast.GtE: "greater_equal",
}
_QUOTED_NAME = re.compile(r"""('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")|`([^`]+)`""")
_HOW = (
    "A filter compares columns with numbers, strings or each other: "
    "width >= 256 and (similarity > 0.28 or 'dog' in title)."
)
_HINTS: dict[type[ast.AST], str] = {
    ast.BinOp: "a filter has no arithmetic; join comparisons with `and`, `or`",
    ast.Name: "compare it, for example with `== True`",
    ast.Call: "the only function is len(column)",
    ast.Is: "use ==",
}


@dataclass(frozen=True)
class Constant:
    """Literal value in a filter."""

    value: str | float | bool


@dataclass(frozen=True)
class Column:
    """Column of the table."""

    name: str
    values: pa.Array


@dataclass(frozen=True)
class Length:
    """Length of a column's values: characters of a text or entries of a list."""

    column: pa.Array


Operand: TypeAlias = Column | Constant | Length
Converter: TypeAlias = Callable[[pa.Array], pa.Array]
Conversions: TypeAlias = dict[tuple[str, Converter], pa.Array]  # columns after conversion for a comparison


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


@dataclass(frozen=True)
class Filter:
    """Condition on rows. Create it with `parse`."""

    text: str  # as written in the configuration
    names: frozenset[str]  # names of the columns in the condition
    _condition: ast.expr
    _quoted: dict[str, str]

    def select(self, extra: Mapping[str, pa.Array], lines: np.ndarray) -> tuple[np.ndarray, list[UnconvertedValues]]:
        """Return which rows match, bool [rows], and the values that could not be compared.

        A comparison is null if a value is missing, or if a text is compared with a number and is not one. Nulls
        propagate as in SQL: `not null` is null, and a row with a null matches only if the rest of the condition
        decides.

        Args:
            extra: columns of `names`: numbers, text, truth values or lists of those.
            lines: line in which each row starts, for messages.
        """
        columns = {name: Column(name, extra[name]) for name in self.names}
        conversions: Conversions = {}
        matches = self._evaluate(self._condition, columns, conversions).fill_null(False)
        return bool_numpy(matches), find_unconverted(extra, conversions, lines)

    def _evaluate(self, node: ast.expr, columns: Mapping[str, Column], conversions: Conversions) -> pa.BooleanArray:
        if isinstance(node, ast.BoolOp):
            combine = pc.and_kleene if isinstance(node.op, ast.And) else pc.or_kleene
            return reduce(combine, (self._evaluate(value, columns, conversions) for value in node.values))
        if isinstance(node, ast.UnaryOp):
            return pc.invert(self._evaluate(node.operand, columns, conversions))
        assert isinstance(node, ast.Compare)
        return reduce(pc.and_kleene, (self._compare(*pair, columns, conversions) for pair in _pairs(node)))

    def _compare(
        self, left: ast.expr, op: ast.cmpop, right: ast.expr, columns: Mapping[str, Column], conversions: Conversions
    ) -> pa.BooleanArray:
        a = self._operand(left, columns)
        if not isinstance(op, ast.In | ast.NotIn):
            return compare(_OPERATORS[type(op)], a, self._operand(right, columns), conversions)
        if isinstance(right, ast.Name):
            found = contains(columns[self._name(right)], a)
        else:
            values = [self._operand(value, columns) for value in right.elts]  # type: ignore[attr-defined]
            found = reduce(pc.or_kleene, (compare("equal", a, value, conversions) for value in values))
        return pc.invert(found) if isinstance(op, ast.NotIn) else found

    def _operand(self, node: ast.expr, columns: Mapping[str, Column]) -> Operand:
        if isinstance(node, ast.Name):
            return columns[self._name(node)]
        if isinstance(node, ast.Call):
            return Length(columns[self._name(node.args[0])].values)
        return Constant(_constant(node))

    def _name(self, node: ast.expr) -> str:
        assert isinstance(node, ast.Name)
        return self._quoted.get(node.id, node.id)


def parse(text: str) -> Filter:
    """Parse a filter.

    Raises: ConfigError that names the part that is not supported.
    """
    quoted: dict[str, str] = {}

    def placeholder(match: re.Match[str]) -> str:
        if match[2] is None:
            return match[1]
        quoted[name := f"_quoted_{len(quoted)}_"] = match[2]
        return name

    source = _QUOTED_NAME.sub(placeholder, text.strip())
    try:
        condition = ast.parse(source, mode="eval").body
        _check_condition(condition)
    except _Unsupported as error:
        part = re.sub(r"_quoted_\d+_", lambda match: f"`{quoted.get(match[0], match[0])}`", error.part)
        raise ConfigError(f"data.filter={text!r}: {part!r} is not supported{error.hint}. {_HOW}") from error
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else str(error)
        raise ConfigError(f"data.filter={text!r} is not a valid condition: {reason.rstrip('.')}. {_HOW}") from error
    called = {node.func for node in ast.walk(condition) if isinstance(node, ast.Call)}
    names = {node.id for node in ast.walk(condition) if isinstance(node, ast.Name) and node not in called}
    return Filter(text, frozenset(quoted.get(name, name) for name in names), condition, quoted)


class _Unsupported(Exception):
    def __init__(self, node: ast.AST, hint: str = "") -> None:
        self.part = ast.unparse(node)
        hint = hint or _HINTS.get(type(node), "")
        self.hint = f": {hint}" if hint else ""


def _check_condition(node: ast.expr) -> None:
    if isinstance(node, ast.BoolOp):
        for value in node.values:
            _check_condition(value)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        _check_condition(node.operand)
    elif isinstance(node, ast.Compare):
        for left, op, right in _pairs(node):
            if isinstance(op, ast.In | ast.NotIn):
                if isinstance(right, ast.Name) and not _is_column(left):
                    _constant(left)
                elif isinstance(right, ast.List | ast.Tuple | ast.Set) and right.elts and _is_column(left):
                    for value in right.elts:
                        _constant(value)
                else:
                    raise _Unsupported(node, "write 'text' in column, or column in ['one', 'another']")
                continue
            if type(op) not in _OPERATORS:
                raise _Unsupported(node, _HINTS.get(type(op), ""))
            for side in (left, right):
                if not _is_column(side):
                    _constant(side)
            if not _is_column(left) and not _is_column(right):
                raise _Unsupported(node, "one side must be a column")
    else:
        raise _Unsupported(node)


def _pairs(node: ast.Compare) -> Iterator[tuple[ast.expr, ast.cmpop, ast.expr]]:
    """Split a chained comparison: `a < b < c` is `a < b and b < c`."""
    return zip([node.left, *node.comparators], node.ops, node.comparators, strict=False)


def _is_column(node: ast.expr) -> bool:
    """Return True if the node is a column or a column's length."""
    if isinstance(node, ast.Call):
        known = isinstance(node.func, ast.Name) and node.func.id == "len" and not node.keywords
        return known and len(node.args) == 1 and isinstance(node.args[0], ast.Name)
    return isinstance(node, ast.Name)


def _constant(node: ast.expr) -> str | float | bool:
    """Return the number, string or truth value of a literal; raises _Unsupported."""
    sign = 1
    value: ast.expr = node
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        sign, value = (-1 if isinstance(node.op, ast.USub) else 1), node.operand
    if not isinstance(value, ast.Constant) or not isinstance(value.value, str | int | float):
        raise _Unsupported(node)
    if isinstance(value.value, str | bool):
        # No column contains a lone surrogate, because it has no UTF-8.
        lone_surrogate = any("\ud800" <= character <= "\udfff" for character in str(value.value))
        if value is not node or lone_surrogate:
            raise _Unsupported(node)
        return value.value
    number = sign * value.value
    if not -(2**63) <= number < 2**63:
        return float(number) if abs(number) < 2**1023 else sign * float("inf")
    return number


# Comparisons of Arrow columns with numbers, text and each other. Values that cannot be compared give null.

_WHOLE = r"^[ \t]*[+-]?[0-9]{1,18}[ \t]*$"
_NUMBER = r"^[ \t]*[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?[ \t]*$"


def compare(operator: str, left: Operand, right: Operand, conversions: Conversions) -> pa.BooleanArray:
    """Evaluate `left operator right`; null where a side is missing or cannot be converted.

    The kind is that of the literal: truth values, text or numbers; a length is a number. Two columns are compared as
    numbers if one of them has a numeric type or the operator is an order such as `<`, else as text.

    Args:
        operator: comparison function of `pyarrow.compute`: equal, less, …
        left, right: operands, at least one of which is a column or length.
        conversions: cache of converted columns; missing ones are added.
    """
    constant = next((side.value for side in (left, right) if isinstance(side, Constant)), None)
    if isinstance(constant, bool):
        convert: Converter = truths
    elif isinstance(constant, str) or (
        constant is None and operator in ("equal", "not_equal") and not (_is_number(left) or _is_number(right))
    ):
        convert = texts
    else:
        convert = numbers
    sides = [_converted(side, convert, conversions) for side in (left, right)]
    if pa.float64() in (sides[0].type, sides[1].type):  # by default, Arrow refuses integers that float64 rounds
        sides = [pc.cast(side, pa.float64(), safe=False) for side in sides]
    return getattr(pc, operator)(*sides)


def contains(whole: Column, constant: Operand) -> pa.BooleanArray:
    """Evaluate `constant in column`: a substring of a text, or an entry of a list."""
    assert isinstance(constant, Constant)
    column = _plain(whole.values)
    if not _is_list(column.type):
        needle = constant.value if isinstance(constant.value, str) else f"{constant.value}"
        return pc.match_substring(texts(column), needle)
    entries = compare("equal", Column(whole.name, pc.list_flatten(column)), constant, {}).fill_null(False)
    parents = pc.filter(pc.list_parent_indices(column), entries)
    found = np.zeros(len(column), dtype=bool)
    found[np.frombuffer(parents.buffers()[1], dtype=np.int64)[parents.offset :][: len(parents)]] = True
    return pc.if_else(pc.is_valid(column), bool_array(found), pa.scalar(None, pa.bool_()))


def numbers(column: pa.Array) -> pa.Array:
    """Convert to int64 if all numbers are integers that fit, so that large identifiers stay distinct, else to float64.

    Values that are not numbers become null.
    """
    column = _plain(column)
    kind = column.type
    if pa.types.is_signed_integer(kind) or (
        pa.types.is_unsigned_integer(kind) and (pc.max(column).as_py() or 0) < 1 << 63
    ):
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
    """Convert numbers, truth values and times to large strings; other values become null."""
    column = _plain(column)
    if _is_list(column.type) or pa.types.is_nested(column.type) or pa.types.is_binary(column.type):
        return pa.nulls(len(column), pa.large_string())
    return pc.cast(column, pa.large_string())


def truths(column: pa.Array) -> pa.Array:
    """Convert to truth values. The texts true, false, 1 and 0 are accepted in any case; other values become null."""
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


def _is_number(side: Operand) -> bool:
    if isinstance(side, Column):
        return pa.types.is_integer(side.values.type) or pa.types.is_floating(side.values.type)
    return isinstance(side, Length)


def _plain(column: pa.Array) -> pa.Array:
    """Decode a dictionary array, and cast all string types to large strings."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_string(column.type) or pa.types.is_string_view(column.type) or pa.types.is_null(column.type):
        return pc.cast(column, pa.large_string())
    return column


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


# Report of values that could not be converted: `1,024` is not a number, so `width >= 256` does not match its row.

_KINDS: dict[Converter, str] = {numbers: "numbers", texts: "text", truths: "truth values"}
_SHOWN = 40  # characters of an example


def find_unconverted(
    columns: Mapping[str, pa.Array], conversions: Conversions, lines: np.ndarray
) -> list[UnconvertedValues]:
    """Return the values of a block of rows that could not be converted.

    Args:
        columns: columns as stored in the file.
        conversions: converted columns, null where the conversion failed.
        lines: line in which each row starts.
    """
    return [
        _unconverted(name, _KINDS[convert], columns[name], converted, lines)
        for (name, convert), converted in conversions.items()
        if converted.null_count
    ]


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


def _unconverted(name: str, kind: str, column: pa.Array, converted: pa.Array, lines: np.ndarray) -> UnconvertedValues:
    lost = pc.is_null(converted)
    values, places = column.filter(lost), lines[bool_numpy(lost)]
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    present = bool_numpy(pc.is_valid(values))
    if pa.types.is_floating(values.type):
        present[:] = False  # NaN, which libraries write for missing values
    elif pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        # As binary, because Parquet files may contain invalid UTF-8.
        values = pc.cast(pc.ascii_trim_whitespace(values), pa.large_binary())
        present &= bool_numpy(pc.not_equal(pc.binary_length(values), 0).fill_null(False))
    count = int(present.sum())
    if not count:
        return UnconvertedValues(name, kind, 0, len(values), "", 0)
    first = int(np.flatnonzero(present)[0])
    value = values[first].as_py()
    example = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
    example = example if len(example) <= _SHOWN else example[:_SHOWN] + "…"
    return UnconvertedValues(name, kind, count, len(values) - count, example, int(places[first]))
