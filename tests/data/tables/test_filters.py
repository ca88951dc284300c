import itertools
import json
import os
import pickle
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clip_exp.data.tables import filters
from clip_exp.data.tables.filters import parse
from clip_exp.data.tables.open import read_table
from clip_exp.errors import ConfigError
from tests.data.tables.shard_files import write_shard
from tests.exhaustive import repeat_beyond

LINES = np.arange(9)
COLUMNS = {
    "width": pa.array(["256", " 12 ", "+3.5", "many", "", None, "-.5", "1.", "2e2"], pa.large_string()),
    "n": pa.array([1, 2, None, 4, 5, 6, 7, 8, 9]),
    "score": pa.array([1.0, float("nan"), 3, 4, 5, 6, 7.5, 8, 9]),
    "title": pa.array(["a dog", None, "Dog", "", "dogs", "it's", "y", "true", "0"]),
    "tags": pa.array([["dog"], [], None, ["x", "dog"], ["d"], ["dog"], [], [], []]),
    "sizes": pa.array([[1, 2], [], None, [3], [4], [], [], [], [2]]),
    "is safe": pa.array([True, False, None] * 3),
    "kind": pa.array(["a", "b", None] * 3).dictionary_encode(),
    "empty": pa.nulls(9),
    "day": pa.array(range(9), pa.date32()),
    "Width": pa.array(range(9), pa.float16()),
    "meta.size": pa.array(range(9)).cast(pa.decimal256(50, 2)),
    "id": pa.array([2**53, 2**53 + 1, 2**63 - 1, *range(6)], pa.uint64()),
    "word": pa.array([str(2**53), f" +{2**53 + 1}", "many", None, *"12345"]),
    "half": pa.array([str(2**53), str(2**53 + 1), "0.5", *"123456"]),
}
MATCHES = {
    # numbers; a text is one where it is written like one
    "n > 4": "5 6 7 8 9", "4 < n": "5 6 7 8 9", "n > 2 AND n <= 6": "4 5 6", "n = 4.0": "4", "n == 4": "4", "n != 4": "1 2 5 6 7 8 9", "n <> 4": "1 2 5 6 7 8 9",
    "n IN (1, 9)": "1 9", "n NOT IN (1, 2, 4)": "5 6 7 8 9", "n in [1, 9]": "1 9", "n = 4 OR n = 6": "4 6", "n BETWEEN 2 AND 4": "2 4", "n > -1e999": "1 2 4 5 6 7 8 9",
    "n < 99999999999999999999": "1 2 4 5 6 7 8 9", "score != 3": "1 4 5 6 7 8 9", "score >= n": "1 4 5 6 7 8 9",
    "width >= 3": "1 2 3 9", "width = 1": "8", "width < 0": "7", "width = '1.'": "8", "n = '4'": "4", "width BETWEEN 1 AND 12": "2 3 8", "width IN (1, 200)": "8 9",
    "width + 1 > 200": "1 9", "abs(width) < 2": "7 8", "n % 2 = 1": "1 5 7 9", "n / 0 > 1 OR n % 0 = 0": "", "round(score / 2) = 2": "3 4", "ceil(width) = 4": "3",
    "greatest(width, n) = 256": "1", "coalesce(width, 0) = 0": "4 5 6", "sqrt(n) = 2": "4",
    # identifiers, which float64 would mix up
    "id = 9007199254740993": "2", "id > 9007199254740992": "2 3", "word = '9007199254740992'": "1", "score < 9007199254740993": "1 3 4 5 6 7 8 9",
    "TRY_CAST(word AS BIGINT) = 9007199254740993": "2", "word > id": "",
    # what is missing or no number matches nothing, nor does its negation
    "NOT width >= 3": "7 8", "NOT score > 3": "1 3", "score > 3": "4 5 6 7 8 9", "empty > 1 OR n = 1": "1", "NOT (empty > 1 OR n = 1)": "", "NOT empty = 'x'": "",
    "title IS NULL": "2", "title IS NOT NULL AND n > 8": "9", "score IS NULL": "2", "n IS DISTINCT FROM 4 AND n > 3": "5 6 7 8 9", "width IS DISTINCT FROM 12 AND n < 4": "1",
    # text
    "title LIKE '%dog%'": "1 5", "title ILIKE '%DOG%'": "1 3 5", "title NOT LIKE '%dog%'": "3 4 6 7 8 9", "title LIKE 'a dog' ESCAPE '!'": "1", "title SIMILAR TO '.*dogs?'": "1 5",
    "'dog' in title": "1 5", "'dog' not in title": "3 4 6 7 8 9", "contains(title, 'dog')": "1 5", "title = 'it''s'": "6", "title IN ('dogs', '')": "4 5", "title > 'a'": "1 5 6 7 8",
    "len(title) > 3": "1 5 6 8", "length(title) = 0": "4", "kind = 'b'": "2 5 8", "kind < 'b'": "1 4 7", "lower(title) = 'dog'": "3",
    "starts_with(title, 'do')": "5", "regexp_matches(title, '^[a-c]')": "1", "trim(width) = '12'": "2", "replace(title, 'dog', 'cat') = 'a cat'": "1", "left(title, 1) || 'x' = 'dx'": "5",
    "title BETWEEN 'a' AND 'e'": "1 5", "n LIKE '4%'": "4", "CASE WHEN n > 6 THEN title = 'y' ELSE kind = 'b' END": "2 5 7", "day > '1970-01-08'": "9", "day < DATE '1970-01-02'": "1",
    # lists
    "'dog' in tags": "1 4 6", "NOT 'dog' IN tags": "2 5 7 8 9", "list_contains(sizes, 2)": "1 9", "len(tags) = 2": "4",
    # truth values, and names that need quotes
    "`is safe` = True": "1 4 7", "\"is safe\"": "1 4 7", "NOT \"is safe\" AND n > 2": "5 8", "\"is safe\" IS NOT TRUE": "2 3 5 6 8 9", "title = False": "9", "title = '\"x\"'": "",
    "Width > 7": "9", "\"meta.size\" > 7": "9",
    # columns with each other: in order as numbers
    "width > n": "1 2 9", "width > half": "3 9", "title = kind": "",
    # a sample of the rows that is the same everywhere
    "md5(title) < '8'": "6 7", "md5_number(title) % 2 = 0": "1 4 5 6",
}  # fmt: skip


@pytest.mark.parametrize("condition", MATCHES)
def test_rows_match_as_the_condition_reads(condition):
    found = parse(condition)
    extra = {name: COLUMNS[name] for name in found.names}
    mask = found.select(extra, LINES)[0]
    assert (mask.dtype, mask.shape) == (np.bool_, (9,))
    assert " ".join(str(row + 1) for row in np.flatnonzero(mask)) == MATCHES[condition]
    sliced = {name: column.slice(2, 5) for name, column in extra.items()}
    assert parse(condition).select(sliced, LINES[2:7])[0].tolist() == mask[2:7].tolist()
    assert pickle.loads(pickle.dumps(found)).select(extra, LINES)[0].tolist() == mask.tolist()


def test_values_that_cannot_be_compared_are_counted_and_missing_ones_apart():
    written = [" 256", "1,024", "512 px", "", None, "nan", "3e2", " ", "x" * 90]
    columns = {
        "width": pa.array(written, pa.large_string()),
        "n": COLUMNS["n"],
        "score": COLUMNS["score"],
        "ok": pa.array(["true", "maybe", "0", *[""] * 6], pa.string()).dictionary_encode(),
        "tags": COLUMNS["tags"],
    }

    def found(condition: str, start: int = 0) -> dict[str, tuple[object, ...]]:
        condition_, rest = parse(condition), {name: column.slice(start) for name, column in columns.items()}
        return {each.column: tuple(vars(each).values())[1:] for each in condition_.select(rest, LINES[start:] + 2)[1]}

    assert found("256 <= width AND (n > 3 OR width < 1000)") == {
        "width": ("numbers", 4, 3, "1,024", 3),
        "n": ("numbers", 0, 1, "", 0),
    }
    assert found("width > 1", start=5) == {"width": ("numbers", 2, 1, "nan", 7)}
    assert found("width > 1", start=8)["width"][3] == "x" * 40 + "…"
    assert found("score > 1 AND ok = true AND 'dog' IN tags") == {
        "score": ("numbers", 0, 1, "", 0),
        "ok": ("truth values", 1, 6, "maybe", 3),
    }
    assert found("width = '' AND len(width) > 3 AND 'x' IN width") == {"width": ("text", 0, 1, "", 0)}
    assert found("width IS NULL OR TRY_CAST(width AS DOUBLE) > 3") == {}


def test_the_names_are_those_of_the_columns():
    assert parse("len(a) > 1 AND \"b c\" IN ('x') OR NOT 'd' IN e AND A").names == {"a", "b c", "e", "A"}


def test_text_that_is_not_utf8_is_replaced():
    """Arrow does not check the UTF-8 of a Parquet file."""
    stored = pa.array([b"a dog\xff", b"x"], pa.binary()).view(pa.string())
    assert parse("title LIKE '%dog%'").select({"title": stored}, LINES[:2])[0].tolist() == [True, False]


# The same rows, however they come.


def some_rows(count: int) -> dict[str, pa.Array]:
    draw = random.Random(0)
    return {
        "width": pa.array(
            [draw.choice(["256", "1,024", "", "3.5", "9", "nan"]) for _ in range(count)], pa.large_string()
        ),
        "title": pa.array(
            [draw.choice(["a dog", "Ein Hund", "一只狗", None]) for _ in range(count)], pa.large_string()
        ),
        "score": pa.array([draw.choice([0.1, 0.5, None, float("nan")]) for _ in range(count)], pa.float64()),
    }


CONDITION = "width > 8 AND md5_number(title) % 3 <> 0 OR ln(score) > -1 AND title NOT LIKE '%dog%'"


def test_the_same_rows_match_in_blocks_of_any_size_in_any_thread(monkeypatch):
    rows, lines = some_rows(5000), np.arange(1, 5001)
    expected, values = parse(CONDITION).select(rows, lines)

    def in_blocks(size: int) -> np.ndarray:
        starts = range(0, 5000, size)
        blocks = [({name: column.slice(i, size) for name, column in rows.items()}, lines[i : i + size]) for i in starts]
        return np.concatenate([parse(CONDITION).select(*block)[0] for block in blocks])

    with ThreadPoolExecutor(4) as threads:
        for mask in threads.map(in_blocks, [1000, 37, 4096, 2048, 5000, 999]):
            assert mask.tolist() == expected.tolist()
    assert 0 < expected.sum() < 5000
    monkeypatch.setattr(filters, "_QUERY_BYTES", 5000)  # so that a block takes many queries
    assert parse(CONDITION).select(rows, lines)[0].tolist() == expected.tolist()
    assert parse(CONDITION).select(rows, lines)[1] == values


def test_the_same_rows_match_with_any_number_of_threads(tmp_path):
    script = (
        "import numpy as np; from tests.data.tables.test_filters import *;"
        "print(np.flatnonzero(parse(CONDITION).select(some_rows(3000), np.arange(3000))[0]).tolist())"
    )
    expected = np.flatnonzero(parse(CONDITION).select(some_rows(3000), np.arange(3000))[0]).tolist()
    for threads in ("1", "4"):
        process = subprocess.run([sys.executable, "-c", script], capture_output=True, env=os.environ | {"OMP_NUM_THREADS": threads}, check=True)  # fmt: skip
        assert process.stdout.decode().strip() == str(expected)


# Null is neither true nor false: a model in Python of AND, OR and NOT, against drawn conditions.


def drawn(draw: random.Random, depth: int) -> tuple[str, object]:
    """Return a condition and its value for each row: True, False or None."""
    if not depth:
        column, operator, limit = draw.choice(["a", "b"]), draw.choice(["<", ">", "="]), draw.randint(0, 3)
        python = {"<": "__lt__", ">": "__gt__", "=": "__eq__"}[operator]
        return (
            f"{column} {operator} {limit}",
            lambda row: None if row[column] is None else getattr(row[column], python)(limit),
        )
    left, left_value = drawn(draw, depth - 1)
    right, right_value = drawn(draw, draw.randint(0, depth - 1))
    if draw.random() < 0.3:
        return f"NOT ({left})", lambda row: None if (value := left_value(row)) is None else not value
    decisive = draw.random() < 0.5  # of OR, True decides; of AND, False

    def combined(row: dict[str, int | None]) -> bool | None:
        values = {left_value(row), right_value(row)}
        return decisive if decisive in values else None if None in values else not decisive

    return f"({left}) {'OR' if decisive else 'AND'} ({right})", combined


@pytest.mark.parametrize("seed", repeat_beyond(range(20), range(300)))
@pytest.mark.parametrize("kind", [pa.int64(), pa.float64(), pa.large_string()], ids=str)
def test_nulls_propagate_as_in_sql(seed, kind):
    condition, expected = drawn(random.Random(seed), 3)
    pairs = list(itertools.product([None, 0, 1, 2, 3], repeat=2))
    columns = {"a": pa.array([a for a, _ in pairs]).cast(kind), "b": pa.array([b for _, b in pairs]).cast(kind)}
    found = parse(condition)
    mask = found.select({name: columns[name] for name in found.names}, np.arange(25))[0]
    assert mask.tolist() == [expected({"a": a, "b": b}) is True for a, b in pairs], condition


# What is refused.

REFUSED = {
    "width >": "syntax error", "": "must be one expression", "1 < 2": "names no column", "true": "names no column",
    "2 < n < 6": "use AND to combine comparisons", "x if y > 1 else z": "syntax error", "x is None": "SQL condition with texts in single quotes",
    # other statements and clauses
    "n > 1; DROP TABLE block": "syntax error", "n > 1); SELECT (1": "one expression", "n > 1) UNION SELECT (1": "one expression", "n > 1) OR (n < 2": "one expression",
    "n > 1) --": "syntax error", "n > 1 /*": "unterminated", "n) FILTER (WHERE n": "one expression", "n) OVER (": "one expression", "DISTINCT n": "one expression", "n ORDER BY n": "one expression",
    "n) LIMIT (1": "one expression", "n) GROUP BY (1": "one expression", "n, n": "one expression", "x := n": "one expression", "*": "one expression",
    # other expressions
    "n IN (SELECT 1)": "subquery is not allowed", "EXISTS (SELECT 1)": "subquery is not allowed", "n = ANY([1])": "subquery", "sum(n) > 1": "sum is not allowed", "count(*) > n": "count_star is not allowed",
    "row_number() OVER () > n": "row_number is not allowed", "n > $1": "parameter is not allowed", "n > ?": "parameter", "[x for x in n] = n": "list_apply", "list_filter(n, lambda x: x > 1) = n": "not allowed",
    "COLUMNS('n') > 1": "star is not allowed", "n COLLATE nocase = 'x'": "collate is not allowed", "#1 > n": "positional_reference", "x'ab' = n": "value_constant",
    # functions that depend on something else, that read, or whose results may be of any size
    "random() < n": "random is not allowed. Allowed are .* abs, ", "now() > n": "now is not allowed", "current_setting('threads') = n": "current_setting is not allowed", "getenv('HOME') = n": "getenv is not",
    "read_csv('x') = n": "read_csv is not allowed", "read_text('/etc/passwd') = n": "read_text", "query('SELECT 1') = n": "query", "repeat(title, 999999999) = ''": "repeat", "range(n) = n": "range",
    "lpad(title, 999999999, 'x') = ''": "lpad", "hash(title) = n": "hash", "replace(title, 'a', 'aa') = ''": "replace takes two quoted texts", "replace(title, title, title) = ''": "replace takes two",
    "concat(" + ", ".join(["title"] * 21) + ") = ''": "texts of more than 20 values", "main.lower(title) = ''": r"lower\(values\)", "lower(DISTINCT title) = ''": r"lower\(values\)",
    # types
    "n::VARCHAR[] = n": "the type list is not allowed, only TINYINT", "CAST(n AS JSON) = n": "the type JSON is not allowed", "n::main.INTEGER = 1": "the type main is not", "n::TIMESTAMPTZ > n": "TIMESTAMPTZ",
    # Python
    "title.lower() = 'x'": r"lower\(values\)", "meta.width > 3": 'double quotes: "meta.width"', "x[0] = 1": "array_extract is not allowed", "`a": "unterminated quoted identifier",
    "__import__('os').system('x') = 1": "system is not allowed", "open('x') > 1": "open is not allowed", "(x := 3) > 1": "syntax error",
    # size
    "(" * 500 + "x > 1" + ")" * 500: "depth", "(" * 5000: "500 parentheses", "NOT " * 2000 + "x > 1": "depth", "NOT " * 5000 + "x > 1": "10,000 characters", "x > 1\0": "syntax error", "x = '\ud800'": "surrogate",
}  # fmt: skip


@pytest.mark.parametrize("condition", REFUSED, ids=lambda condition: ascii(condition[:30]))
def test_what_is_not_allowed_is_named(condition):
    with pytest.raises(ConfigError, match=REFUSED[condition]) as raised:
        parse(condition)
    assert "\n" not in str(raised.value)
    assert str(raised.value).startswith("data.filter=")


FAILS = {
    "CAST(width AS INTEGER) > 1": "fails for a row: Could not convert string 'many' to INT32. TRY_CAST", "n IN (1, 'x')": "fails for a row: Could not convert string 'x'",
    "ln(n - 5) > 0": "fails for a row: cannot take logarithm of a negative number. Leave such rows out: CASE WHEN", "title || 'x'": "gives text, not true or false", "tags": "gives other values",
    "tags = 'dog'": "cast", "n + tags > 1": "No function matches", "len(width, n) > 1": "No function matches", "replace(width, ',', '') > 256": "explicit cast is required",
    "word = 9007199254740993": "word is text, and as numbers, large integers are rounded: write word = '9007199254740993' or TRY_CAST", "title ~ '(a{1000}){1000}'": "invalid repetition size",
}  # fmt: skip


@pytest.mark.parametrize("condition", FAILS)
def test_a_condition_that_does_not_fit_the_columns_is_one_clear_error(condition):
    found = parse(condition)
    with pytest.raises(ConfigError) as raised:
        found.select({name: COLUMNS[name] for name in found.names}, LINES)
    assert FAILS[condition] in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_condition_that_takes_too_long_is_interrupted(monkeypatch):
    monkeypatch.setattr(filters, "_TIMEOUT_S", 0.01)
    title = pa.array(["ab" * 1000] * 6000, pa.large_string())
    slow = " OR ".join(f"regexp_matches(title, '(?i)(.*a){{60}}(.*b){{60}}{i}')" for i in range(10))
    with pytest.raises(ConfigError, match=r"is too slow: some rows took more than 0.01 s. Simplify it"):
        parse(slow).select({"title": title}, np.arange(6000))
    monkeypatch.undo()
    assert parse("title LIKE 'ab%'").select({"title": title}, np.arange(6000))[0].all()


PIECES = r"""
    ( ) ( ) ) ; , . * -- /* */ ' " ` $$ $1 ? :: -> [ ] { } | & < > = <> + - / % || ~ @ # \ : :=
    n n title title width 'a' '%a%' 1 0 1e999 NULL TRUE -1 99999999999999999999
    SELECT FROM WHERE UNION AND OR NOT IN LIKE BETWEEN IS CASE WHEN THEN ELSE END CAST TRY_CAST AS INT[] VARCHAR DISTINCT OVER EXISTS FILTER ORDER BY LIMIT LAMBDA ESCAPE
    lower( contains( concat( replace( list_value( nullif( coalesce( read_text('{secret}') read_csv('{secret}') '{secret}' FROM…'{secret}' glob('{secret}') getenv('HOME') sniff_csv('{secret}')
    random() pragma_version() duckdb_settings() current_setting('x') SET…threads=8 ATTACH…'{secret}' COPY…t…TO…'{secret}.out' INSTALL…httpfs LOAD…httpfs block main.block main.lower( system.main.
""".split()  # noqa: SIM905


@pytest.mark.parametrize("seed", repeat_beyond(range(3), range(40)))
def test_no_combination_of_words_reads_a_file_or_raises_another_error(seed, tmp_path):
    secret = tmp_path / "secret.csv"
    secret.write_text("n\nsecret\n")
    draw = random.Random(seed)
    accepted = 0
    for _ in range(150):
        words = draw.choices(PIECES, k=draw.randint(1, 12))
        if draw.random() < 0.8:
            words = draw.choice(list(MATCHES)).split()
            words[(place := draw.randint(0, len(words))) : place] = draw.choices(PIECES, k=draw.randint(0, 3))
        condition = " ".join(words).replace("…", " ").replace("{secret}", str(secret))
        try:
            found = parse(condition)
            extra = {name: COLUMNS.get(name, COLUMNS["title"]) for name in found.names}
            found.select(extra, LINES)
            accepted += 1
        except ConfigError:
            continue
    assert accepted
    assert [file.name for file in tmp_path.iterdir()] == ["secret.csv"]


def test_the_connection_can_reach_nothing_else(tmp_path):
    """What the parser refuses would fail as well if it did not."""
    import duckdb

    (tmp_path / "t.csv").write_text("n\n1\n")
    outside = pa.table({"n": [1]})  # noqa: F841 - in reach of replacement scans
    connection = filters._connect()
    for query in (
        f"SELECT * FROM read_csv('{tmp_path}/t.csv')", f"SELECT * FROM '{tmp_path}/t.csv'", f"COPY (SELECT 1) TO '{tmp_path}/u.csv'", f"ATTACH '{tmp_path}/u.db'",
        "SELECT * FROM outside", "SELECT getenv('HOME')", "SET threads = 8", "SET enable_external_access = true", "INSTALL httpfs", "LOAD httpfs",
    ):  # fmt: skip
        with pytest.raises(duckdb.Error):
            connection.execute(query).fetchall()
    assert connection.execute("SELECT current_setting('threads')").fetchall() == [(1,)]
    assert [file.name for file in tmp_path.iterdir()] == ["t.csv"]


# In every format.


def test_a_filter_selects_the_same_rows_of_every_format(tmp_path):
    records = [
        {"filepath": f"{i}.jpg", "title": f"a {'dog' if i % 3 else 'cat'} {i}", "width": i * 7 % 512, "ok": i % 2 == 0}
        for i in range(300)
    ]
    lines = [json.dumps(record) for record in records]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    cells = [",".join(str(value) for value in record.values()) for record in records]
    (tmp_path / "t.csv").write_text("\n".join(["filepath,title,width,ok", *cells]))
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "t.parquet")
    samples = [
        (f"{i}.{ending}", content)
        for i, line in enumerate(lines)
        for ending, content in (("jpg", b"image"), ("json", line))
    ]
    write_shard(tmp_path / "t.tar", dict(samples))
    for condition in (
        "width >= 256 AND title LIKE '%dog%'",
        "ok AND width % 5 = 0",
        "ok = false OR width IN (7, 14)",
        "width BETWEEN 100 AND 200 AND md5(title) < '8'",
        "width = '21' OR title IN ('a cat 0')",
        "coalesce(width, 0) / 2 > 250",
    ):
        found = [
            read_table(tmp_path / f"t.{ending}", filter=condition) for ending in ("csv", "jsonl", "parquet", "tar")
        ]
        captions = [[table.caption(row) for row in range(len(table))] for table in found]
        assert 0 < len(captions[0]) < 300, condition
        assert captions == [captions[0]] * 4, condition
