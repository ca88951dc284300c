"""Row filters: `data.filter="width >= 256 AND similarity > 0.28 AND title LIKE '%dog%'"`, one SQL expression.

DuckDB parses the expression. Its tree may contain only the operators and functions listed here, so the same rows are
selected on every machine, and nothing but the columns is read. Columns that are compared with another kind of value, such
as text with a number, are converted. DuckDB then evaluates the tree, one block of rows at a time.
"""

import json
import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clip_exp.data.tables.unconverted import UnconvertedValues, find_unconverted
from clip_exp.errors import ConfigError

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

Node: TypeAlias = dict[str, Any]  # of an expression, as DuckDB serializes it

# The functions: kinds of the arguments, of which the last one repeats, and of the result. n: numbers, t: text, b: truth
# values, o: others, such as dates and lists, *: one kind for all. Each is deterministic, and none has a result that is
# much larger than its arguments.
_FUNCTIONS = {
    name: (arguments, result)
    for arguments, result, names in (
        ("t", "t", "lower upper trim ltrim rtrim concat || replace regexp_extract md5"),
        ("tn", "t", "left right substring substr"),
        ("t", "n", "length len strlen md5_number"),
        ("t", "b", "starts_with ends_with prefix suffix regexp_matches regexp_full_match"),
        ("t", "b", "~~ !~~ ~~* !~~* like_escape not_like_escape"),  # LIKE, ILIKE
        ("n", "n", "+ - * / // % mod abs round floor ceil ceiling sqrt ln log"),
        ("*", "*", "nullif greatest least"),
        ("*", "b", "contains"),  # of a text, or in a list
        ("o", "b", "list_contains list_has"),
        ("o", "o", "list_value"),  # ['a', 'b']
    )
    for name in names.split()
}
_OPERATORS = ("OPERATOR_NOT", "OPERATOR_IS_NULL", "OPERATOR_IS_NOT_NULL", "COMPARE_IN", "OPERATOR_COALESCE")
_TYPES = {
    name: kind
    for kind, names in (
        ("n", "TINYINT SMALLINT INTEGER BIGINT HUGEINT UTINYINT USMALLINT UINTEGER UBIGINT FLOAT DOUBLE DECIMAL"),
        ("t", "VARCHAR TEXT"),
        ("b", "BOOLEAN BOOL"),
        ("o", "DATE TIMESTAMP"),
    )
    for name in names.split()
}
_LITERALS = {"INTEGER": "n", "NUMERIC": "n", "STRING": "t", "BOOLEAN": "b", "NULL_LITERAL": ""}
_KINDS = {"n": "numbers", "t": "text", "b": "truth values", "o": "other values"}
_ALLOWED = (
    "Allowed are comparisons, AND, OR, NOT, BETWEEN, IN, LIKE, IS NULL, CASE, CAST, TRY_CAST, arithmetic and "
    + ", ".join(sorted(name for name in {"coalesce", *_FUNCTIONS} - {"list_value"} if name.isidentifier()))
)
_EXAMPLE = "A filter is an SQL condition with texts in single quotes: width >= 256 AND (title LIKE '%dog%' OR similarity IS NULL)"

_MAX_LENGTH = 10_000  # characters
_MAX_PARENTHESES = 500  # more unclosed ones take seconds to parse
_MAX_DEPTH = 100  # nested operators
_MAX_TEXTS = 20  # arguments of functions that return texts, which DuckDB's limit of memory does not count
_QUERY_BYTES = 16 << 20  # columns of one query, which can only be interrupted every 2,048 rows
_TIMEOUT_S = 60.0  # of one query


@dataclass(frozen=True)
class Filter:
    """Condition on rows. Create it with `parse`."""

    text: str  # as written in the configuration
    names: frozenset[str]  # names of the columns in the condition

    def select(self, extra: Mapping[str, pa.Array], lines: np.ndarray) -> tuple[np.ndarray, list[UnconvertedValues]]:
        """Return which rows match, bool [rows], and the values that could not be compared.

        A row matches if the condition is true for it, not if it is null. A text that is compared with a number is null
        if it is not a number.

        Args:
            extra: columns of `names`: numbers, texts, truth values, dates, or lists of those.
            lines: line in which each row starts, for messages.

        Raises: ConfigError if the condition does not fit the columns, or a CAST fails.
        """
        columns = {name: _plain(extra[name]) for name in sorted(self.names)}
        kinds = tuple((name, _kind_of_type(column.type)) for name, column in columns.items())
        # Numbered, because names in DuckDB do not depend on case.
        table = pa.table(list(columns.values()), [f"c{i}" for i in range(len(columns))])
        rows = max(1, len(lines) * _QUERY_BYTES // max(1, table.nbytes))
        with _errors_of(self.text):
            query, compared = _compile(self.text, kinds)
            results = [_evaluate(query, table.slice(start, rows)) for start in range(0, max(1, len(lines)), rows)]
        matches, *nulls = (np.concatenate(parts) for parts in zip(*results, strict=True))
        unconverted = [
            find_unconverted(name, _KINDS[kind], columns[name], lost, lines)
            for (name, kind), lost in zip(compared, nulls, strict=True)
            if lost.any()
        ]
        return matches, unconverted


@lru_cache(maxsize=64)
def parse(text: str) -> Filter:
    """Parse a filter.

    Raises: ConfigError that names the part that is not allowed.
    """
    with _errors_of(text):
        names = {node["column_names"][0] for node in _walk(_parse(text)[1]) if node["class"] == "COLUMN_REF"}
        if not names:
            raise _Refused("it names no column")
    return Filter(text, frozenset(names))


class _Refused(Exception):
    """Reason for which a filter is not valid."""


@contextmanager
def _errors_of(text: str) -> Iterator[None]:
    """Turn the errors of a filter into a ConfigError with one line."""
    import duckdb  # imported here, because it takes 0.2 s that a command without a filter does not need

    try:
        yield
    except (_Refused, duckdb.Error, pa.ArrowException, RecursionError) as error:
        # The first line of DuckDB's message, without the kind of error and the numbered column.
        reason = re.sub(r"^[A-Z][\w ]* Error: | when casting from source column \w+", "", str(error).partition("\n")[0])
        problem, fix = "is not a valid condition", _EXAMPLE
        if isinstance(error, RecursionError):
            reason = "it is nested too deeply"
        elif isinstance(error, duckdb.InterruptException):
            problem, reason, fix = "is too slow", f"some rows took more than {_TIMEOUT_S:g} s", "Simplify it"
        elif isinstance(error, duckdb.OutOfRangeException):
            problem, fix = "fails for a row", "Leave such rows out: CASE WHEN width > 0 THEN ln(width) > 5 END"
        elif isinstance(error, duckdb.ConversionException):
            problem, fix = "fails for a row", "TRY_CAST(column AS DOUBLE) gives null for a text that is not a number"
        shown = repr(text if len(text) <= 200 else text[:200] + "…")
        raise ConfigError(f"data.filter={shown} {problem}: {reason.rstrip('. ')}. {fix}.") from error


# DuckDB, without access to anything but the registered rows.


@lru_cache(maxsize=8)
def _connection(process: int, thread: int) -> "DuckDBPyConnection":
    """Return the connection of a thread: threads cannot use one at the same time, nor can a process after a fork."""
    import duckdb

    return duckdb.connect(
        ":memory:",
        config={
            "threads": 1,
            "memory_limit": "1GB",
            "max_expression_depth": _MAX_DEPTH,
            # Null and errors instead of infinity and NaN, which is greater than all numbers in DuckDB.
            "ieee_floating_point_ops": False,
            "error_on_division_by_zero": False,
            "enable_external_access": False,
            "autoinstall_known_extensions": False,
            "autoload_known_extensions": False,
            "python_enable_replacements": False,
            "lock_configuration": True,
        },
    )


def _connect() -> "DuckDBPyConnection":
    return _connection(os.getpid(), threading.get_ident())


def _evaluate(query: str, table: pa.Table) -> list[np.ndarray]:
    """Return the columns of a query over the table `block`, bool [rows]; null is False."""
    connection = _connect()
    timer = threading.Timer(_TIMEOUT_S, connection.interrupt)
    timer.daemon = True
    connection.register("block", table)
    timer.start()
    try:
        found = connection.execute(query).fetchnumpy()
    finally:
        timer.cancel()
        connection.unregister("block")
    return [np.ma.filled(column, False).astype(bool) for column in found.values()]


# Parsing and checking.


def _parse(text: str) -> tuple[Node, Node]:
    """Return a statement that selects from the table `block`, and the checked condition in it."""
    if len(text) > _MAX_LENGTH or text.count("(") > _MAX_PARENTHESES:
        raise _Refused(f"it has more than {_MAX_LENGTH:,} characters or {_MAX_PARENTHESES} parentheses")
    statement, template = _serialized(text), _serialized("1")
    call, expected = (tree["statements"][0]["node"].pop("where_clause", None) for tree in (statement, template))
    # A filter that closes the parenthesis, or adds a clause, is not the only argument of one plain call.
    same = ("class", "function_name")
    if not call or any(call.get(key) != expected[key] for key in same) or len(call["arguments"]) != 1:
        raise _Refused("it must be one expression")
    condition = call["arguments"][0]["expression"]
    _check(condition)
    if statement != template or not _is_plain(call):
        raise _Refused("it must be one expression")
    return statement, condition


def _serialized(condition: str) -> Node:
    query = f"SELECT 1 FROM block WHERE condition(\n{condition}\n)"
    tree = json.loads(_connect().sql("SELECT json_serialize_sql(?)", params=[query]).fetchall()[0][0])
    if tree["error"]:
        raise _Refused(tree["error_message"].partition("\n")[0].partition(" Use ")[0])
    return tree


def _operands(node: Node) -> list[Node]:
    """Return the operands of an operator or a function; of CASE, each condition and its value, then the last value."""
    match node["class"]:
        case "COMPARISON":
            return [node["left"], node["right"]]
        case "BETWEEN":
            return [node["input"], node["lower"], node["upper"]]
        case "CONJUNCTION" | "OPERATOR":
            return node["children"]
        case "CASE":
            pairs = [check[key] for check in node["case_checks"] for key in ("when_expr", "then_expr")]
            return [*pairs, node["else_expr"]]
        case "CAST":
            return [node["child"]]
        case "FUNCTION":
            return [argument["expression"] for argument in node["arguments"]]
    return []


def _walk(node: Node) -> Iterator[Node]:
    yield node
    for operand in _operands(node):
        yield from _walk(operand)


def _check(condition: Node) -> None:
    """Raise _Refused for everything that is not listed."""
    texts = 0
    for node in _walk(condition):
        match node["class"]:
            case "COMPARISON" | "BETWEEN" | "CONJUNCTION" | "CASE":
                pass
            case "CONSTANT" if node["literal"]["kind"] in _LITERALS:
                pass
            case "OPERATOR" if node["type"] in _OPERATORS:
                pass
            case "COLUMN_REF":
                if len(node["column_names"]) > 1:
                    name = ".".join(node["column_names"])
                    raise _Refused(f'a column name with a dot needs double quotes: "{name}"')
            case "CAST":
                name, *rest = (
                    kind["qualified_name"]["path"] if "qualified_name" in (kind := node["type_expr"]) else [""]
                )
                if name.upper() not in _TYPES or rest or any(each["class"] != "CONSTANT" for each in kind["children"]):
                    raise _Refused(f"the type {name} is not allowed, only {', '.join(_TYPES)}")
            case "FUNCTION" if (name := node["function_name"]) in _FUNCTIONS:
                if not _is_plain(node):
                    raise _Refused(f"{name} must be called as {name}(values)")
                if name == "replace" and not _shortens(*_operands(node)):
                    raise _Refused("replace takes two quoted texts, the second not longer: replace(width, ',', '')")
                texts += len(node["arguments"]) if _FUNCTIONS[name][1] == "t" else 0
            case _:
                what = node.get("function_name") or node["type"].lower()
                raise _Refused(f"{what} is not allowed. {_ALLOWED}")
    if texts > _MAX_TEXTS:
        raise _Refused(f"its functions make texts of more than {_MAX_TEXTS} values")


def _is_plain(call: Node) -> bool:
    """Return True for `name(values)`, without a schema, named arguments, DISTINCT, FILTER or ORDER BY."""
    names = [call["schema"], call["catalog"], *(argument["name"] for argument in call["arguments"])]
    return not (any(names) or call["distinct"] or call["filter"] or call["order_bys"]["orders"])


def _shortens(*arguments: Node) -> bool:
    """Return True for a replacement of a literal by one that is not longer, so that nested ones cannot grow."""
    lengths = [len(each["literal"]["text"]) for each in arguments[1:] if "literal" in each]
    return len(lengths) == 2 == len(arguments) - 1 and lengths[0] >= lengths[1]


# Conversion of columns to the kind of value with which they are compared.

# Through text, so that a value of JSON Lines is equal in a block of one type and in a mixed block, which has texts.
_CONVERTED = {
    "n": "nullif(TRY_CAST(CAST({} AS VARCHAR) AS DOUBLE), 'nan'::DOUBLE)",
    "t": "CAST({} AS VARCHAR)",
    "b": "TRY_CAST(CAST({} AS VARCHAR) AS BOOLEAN)",
}
_ORDERS = tuple(
    f"COMPARE_{order}" for order in ("LESSTHAN", "LESSTHANOREQUALTO", "GREATERTHAN", "GREATERTHANOREQUALTO", "BETWEEN")
)
_MAX_EXACT = 1 << 53  # integers up to this are exact in float64


@lru_cache(maxsize=64)
def _compile(text: str, kinds: tuple[tuple[str, str], ...]) -> tuple[str, list[tuple[str, str]]]:
    """Return a query over the table `block`, and the columns that the filter compares, with the kind of the comparison.

    The query gives the condition for each row, and for each of these columns, whether its value is null.

    Args:
        kinds: name and kind of each column.
    """
    statement, condition = _parse(text)
    kind_of = dict(kinds)
    if (kind := _kind(condition, kind_of)) == "o" or (kind in ("n", "t") and condition["class"] != "COLUMN_REF"):
        raise _Refused(f"it gives {_KINDS[kind]}, not true or false")
    wanted = {id(condition): "b"}
    for node in _walk(condition):
        wanted |= {id(operand): needed for operand, needed in _wanted(node, kind_of)}
    places = {name: f"c{i}" for i, name in enumerate(kind_of)}
    compared: dict[tuple[str, str], str] = {}
    for node in _walk(condition):
        if node["class"] == "COLUMN_REF":
            name = node["column_names"][0]
            needed = wanted.get(id(node), "")
            is_compared = needed in _CONVERTED and kind_of[name] != "o"
            place = compared.setdefault((name, needed), f"x{len(compared)}") if is_compared else places[name]
            node["column_names"] = [place]
    nulls = [{"class": "COLUMN_REF", "type": "COLUMN_REF", "column_names": [f"{x}_null"]} for x in compared.values()]
    # Not as a WHERE clause: DuckDB orders its terms by measured times, on which it would depend whether a CAST that
    # fails is evaluated.
    select = statement["statements"][0]["node"]
    select["select_list"], select["where_clause"] = [condition, *nulls], None
    query = _connect().sql("SELECT json_deserialize_sql(?)", params=[json.dumps(statement)]).fetchall()[0][0]
    converted = ["*"]
    for (name, kind), x in compared.items():
        value = places[name] if kind_of[name] == kind else _CONVERTED[kind].format(places[name])
        converted.append(f"{value} AS {x}, {x} IS NULL AS {x}_null")
    return f"WITH block AS (SELECT {', '.join(converted)} FROM main.block) {query}", list(compared)


def _wanted(node: Node, kinds: Mapping[str, str]) -> Iterator[tuple[Node, str]]:
    """Yield operands of a node, each with the kind of value that is needed there."""
    operands = _operands(node)
    arguments, _ = _FUNCTIONS.get(node.get("function_name", ""), ("", ""))
    if node["class"] == "CONJUNCTION" or node["type"] == "OPERATOR_NOT":
        arguments = "b"
    elif node["class"] == "CASE":
        yield from ((operand, "b") for operand in operands[:-1:2])
    if arguments and arguments != "*":
        yield from ((operand, arguments[min(i, len(arguments) - 1)]) for i, operand in enumerate(operands))
    elif group := _compared(node):
        # All columns of a CSV file are texts, so an order such as width > height compares numbers.
        ordered = node["type"] in _ORDERS and all(operand["class"] == "COLUMN_REF" for operand in group)
        kind = "n" if ordered and _common(group, kinds) == "t" else _common(group, kinds)
        if kind == "n":
            _check_exact(group, kinds)
        yield from ((operand, kind) for operand in group)


def _compared(node: Node) -> list[Node]:
    """Return the operands of a node that are compared with each other, or one of which is its value."""
    operands = _operands(node)
    if node["class"] == "CASE":
        return [*operands[1:-1:2], operands[-1]]
    if _FUNCTIONS.get(node.get("function_name", ""), ("", ""))[0] == "*":
        is_list = operands and operands[0].get("function_name") == "list_value"  # column IN ['a', 'b']
        return [*_operands(operands[0]), *operands[1:]] if is_list else operands
    is_group = node["class"] in ("COMPARISON", "BETWEEN") or node["type"] in ("COMPARE_IN", "OPERATOR_COALESCE")
    return operands if is_group else []


def _kind(node: Node, kinds: Mapping[str, str]) -> str:
    """Return the kind of a node's value; "" for null."""
    match node["class"]:
        case "CONSTANT":
            return _LITERALS[node["literal"]["kind"]]
        case "COLUMN_REF":
            return kinds[node["column_names"][0]]
        case "CAST":
            return _TYPES[node["type_expr"]["type_name"].upper()]
        case "FUNCTION" if (result := _FUNCTIONS[node["function_name"]][1]) != "*":
            return result
        case "FUNCTION" | "CASE":
            return _common(_compared(node), kinds)
    return _common(_compared(node), kinds) if node["type"] == "OPERATOR_COALESCE" else "b"


def _common(nodes: Sequence[Node], kinds: Mapping[str, str]) -> str:
    """Return the kind in which values are compared: texts with columns as text, else numbers or truth values if there are any."""
    found = {_kind(node, kinds) for node in nodes} - {""}
    rest = {_kind(node, kinds) for node in nodes if node["class"] != "COLUMN_REF"} - {""}
    if "o" in found or not found:
        return "o" if found else ""
    return "t" if rest == {"t"} else next(kind for kind in "nbt" if kind in found)


def _check_exact(group: Sequence[Node], kinds: Mapping[str, str]) -> None:
    """Raise _Refused if a column of texts is compared with an integer that float64 rounds."""
    names = [node["column_names"][0] for node in group if node["class"] == "COLUMN_REF"]
    name = next((name for name in names if kinds[name] == "t"), None)
    whole = [node["literal"]["text"] for node in group if node.get("literal", {}).get("kind") == "INTEGER"]
    if name and (large := next((text for text in whole if abs(int(text)) > _MAX_EXACT), None)):
        raise _Refused(
            f"{name} is text, and as numbers, large integers are rounded: write {name} = '{large}' or "
            f"TRY_CAST({name} AS BIGINT) = {large}"
        )


def _kind_of_type(kind: pa.DataType) -> str:
    if pa.types.is_large_string(kind):
        return "t"
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return "n"
    return "b" if pa.types.is_boolean(kind) else "" if pa.types.is_null(kind) else "o"


def _plain(column: pa.Array) -> pa.Array:
    """Convert a column to a type that DuckDB reads: valid large strings, and numbers with null for NaN."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type
    if pa.types.is_float16(kind) or pa.types.is_decimal256(kind):
        column = pc.cast(column, pa.float64(), safe=False)
    if pa.types.is_floating(
        column.type
    ):  # in DuckDB, NaN is greater than all numbers, but libraries write it for missing values
        return pc.if_else(pc.is_nan(column), pa.scalar(None, column.type), column)
    if not (pa.types.is_string(kind) or pa.types.is_string_view(kind) or pa.types.is_large_string(kind)):
        return column
    column = pc.cast(column, pa.large_string())
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:  # Arrow does not check the UTF-8 of a Parquet file
        stored = pc.cast(column, pa.large_binary()).to_pylist()
        return pa.array(
            [None if each is None else each.decode("utf-8", "replace") for each in stored], pa.large_string()
        )
    return column
