"""Which rows are used, by their columns: `data.filter="width >= 256 and similarity > 0.28 and 'dog' in title"`.

The language is a corner of Python's: comparisons, `and`, `or`, `not`, `in`, `len(column)`, numbers, strings, True, False and
names of columns; a name that is no Python name stands in backticks, as in pandas. It is read by Python's parser and never run.
"""

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clip_exp.data.tables import comparisons
from clip_exp.data.tables.columns import bool_numpy
from clip_exp.data.tables.comparisons import Column, Constant, Conversions, Length, Operand, Unlike, find_unlike
from clip_exp.errors import ConfigError

Columns: TypeAlias = Mapping[str, Column]
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
    "It compares columns with numbers, strings or each other: width >= 256 and (similarity > 0.28 or 'dog' in title)."
)
_HINTS: dict[type[ast.AST], str] = {
    ast.BinOp: "join comparisons with `and`, `or`; nothing is calculated",
    ast.Name: "compare it, as with `== True`",
    ast.Call: "only len(column) is known",
    ast.Is: "use ==",
}


@dataclass(frozen=True)
class Filter:
    """A condition on rows. Made by `parse`.

    Attributes:
        text: as it is written in the configuration.
        names: of the columns that it needs.
    """

    text: str
    names: frozenset[str]
    _condition: ast.expr
    _quoted: dict[str, str]

    def select(self, extra: Mapping[str, pa.Array], lines: np.ndarray) -> tuple[np.ndarray, list[Unlike]]:
        """Return which rows match, bool [rows], and an account of the values that could not be compared.

        A comparison with a missing value, or of a text that is no number with a number, is neither true nor false, and `not`
        does not change that: such a row matches only where the rest of the condition is enough.

        Args:
            extra: the columns of `names`: numbers, text, truth values or lists of those.
            lines: where each row starts in its file, for the account.
        """
        columns = {name: Column(name, extra[name]) for name in self.names}
        conversions: Conversions = {}
        matches = self._evaluate(self._condition, columns, conversions).fill_null(False)
        return bool_numpy(matches), find_unlike(extra, conversions, lines)

    def _evaluate(self, node: ast.expr, columns: Columns, conversions: Conversions) -> pa.BooleanArray:
        if isinstance(node, ast.BoolOp):
            combine = pc.and_kleene if isinstance(node.op, ast.And) else pc.or_kleene
            return reduce(combine, (self._evaluate(value, columns, conversions) for value in node.values))
        if isinstance(node, ast.UnaryOp):
            return pc.invert(self._evaluate(node.operand, columns, conversions))
        assert isinstance(node, ast.Compare)
        return reduce(pc.and_kleene, (self._compare(*pair, columns, conversions) for pair in _pairs(node)))

    def _compare(
        self, left: ast.expr, op: ast.cmpop, right: ast.expr, columns: Columns, conversions: Conversions
    ) -> pa.BooleanArray:
        a = self._operand(left, columns)
        if not isinstance(op, ast.In | ast.NotIn):
            return comparisons.compare(_OPERATORS[type(op)], a, self._operand(right, columns), conversions)
        if isinstance(right, ast.Name):
            found = comparisons.contains(columns[self._name(right)], a)
        else:
            values = [self._operand(value, columns) for value in right.elts]  # type: ignore[attr-defined]
            found = reduce(pc.or_kleene, (comparisons.compare("equal", a, value, conversions) for value in values))
        return pc.invert(found) if isinstance(op, ast.NotIn) else found

    def _operand(self, node: ast.expr, columns: Columns) -> Operand:
        if isinstance(node, ast.Name):
            return columns[self._name(node)]
        if isinstance(node, ast.Call):
            return Length(columns[self._name(node.args[0])].values)
        return Constant(_constant(node))

    def _name(self, node: ast.expr) -> str:
        assert isinstance(node, ast.Name)
        return self._quoted.get(node.id, node.id)


def parse(text: str) -> Filter:
    """The filter that a text describes.

    Raises: ConfigError that names what is not understood.
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
    except _NotUnderstood as error:
        part = re.sub(r"_quoted_\d+_", lambda match: f"`{quoted.get(match[0], match[0])}`", error.part)
        raise ConfigError(f"data.filter={text!r}: {part!r} is not understood{error.hint}. {_HOW}") from error
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else str(error)
        raise ConfigError(f"data.filter={text!r} is no condition: {reason.rstrip('.')}. {_HOW}") from error
    called = {node.func for node in ast.walk(condition) if isinstance(node, ast.Call)}
    names = {node.id for node in ast.walk(condition) if isinstance(node, ast.Name) and node not in called}
    return Filter(text, frozenset(quoted.get(name, name) for name in names), condition, quoted)


class _NotUnderstood(Exception):
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
            _check_pair(node, left, op, right)
    else:
        raise _NotUnderstood(node)


def _pairs(node: ast.Compare) -> Iterator[tuple[ast.expr, ast.cmpop, ast.expr]]:
    """`a < b < c` is `a < b and b < c`."""
    return zip([node.left, *node.comparators], node.ops, node.comparators, strict=False)


def _check_pair(whole: ast.Compare, left: ast.expr, op: ast.cmpop, right: ast.expr) -> None:
    if isinstance(op, ast.In | ast.NotIn):
        if isinstance(right, ast.Name) and not _is_column(left):
            _constant(left)
        elif isinstance(right, ast.List | ast.Tuple | ast.Set) and right.elts and _is_column(left):
            for value in right.elts:
                _constant(value)
        else:
            raise _NotUnderstood(whole, "write 'text' in column, or column in ['one', 'another']")
        return
    if type(op) not in _OPERATORS:
        raise _NotUnderstood(whole, _HINTS.get(type(op), ""))
    for side in (left, right):
        if not _is_column(side):
            _constant(side)
    if not _is_column(left) and not _is_column(right):
        raise _NotUnderstood(whole, "one side must be a column")


def _is_column(node: ast.expr) -> bool:
    """Whether it is a column or a column's length."""
    if isinstance(node, ast.Call):
        known = isinstance(node.func, ast.Name) and node.func.id == "len" and not node.keywords
        return known and len(node.args) == 1 and isinstance(node.args[0], ast.Name)
    return isinstance(node, ast.Name)


def _is_unicode(text: str) -> bool:
    """Whether it is free of halves of surrogate pairs, which no column holds."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _constant(node: ast.expr) -> str | float | bool:
    """The number, string or truth value that is written.

    Raises: _NotUnderstood.
    """
    sign = 1
    value: ast.expr = node
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        sign, value = (-1 if isinstance(node.op, ast.USub) else 1), node.operand
    if not isinstance(value, ast.Constant) or not isinstance(value.value, str | int | float):
        raise _NotUnderstood(node)
    if isinstance(value.value, str | bool):
        if value is not node or not _is_unicode(str(value.value)):
            raise _NotUnderstood(node)
        return value.value
    number = sign * value.value
    if not -(2**63) <= number < 2**63:
        return float(number) if abs(number) < 2**1023 else sign * float("inf")
    return number
