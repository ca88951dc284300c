"""Further columns (`data.columns`): the same values from every format, and rows whose values do not fit."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clip_exp.data.tables.features import numbers_of, parse_numbers, shape_of, to_json
from clip_exp.data.tables.open import read_table
from clip_exp.data.tables.table import PairTable
from clip_exp.errors import DataError
from tests.data.conftest import write_table
from tests.data.tables.shard_files import write_shard

Rows = list[dict[str, Any]]
LINES = {"csv": "line {}", "jsonl": "line {}", "parquet": "row {}", "tar": "sample {}"}


def write_csv(folder: Path, rows: Rows) -> Path:
    cells = [[value if isinstance(value, str) else json.dumps(value) for value in row.values()] for row in rows]
    return write_table(folder / "t.csv", [list(rows[0]), *cells])


def write_jsonl(folder: Path, rows: Rows) -> Path:
    (folder / "t.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder / "t.jsonl"


def write_parquet(folder: Path, rows: Rows, **types: pa.DataType) -> Path:
    columns = {name: pa.array([row.get(name) for row in rows], types.get(name)) for name in rows[0]}
    pq.write_table(pa.table(columns), folder / "t.parquet")
    return folder / "t.parquet"


def write_tar(folder: Path, rows: Rows) -> Path:
    members = {}
    for i, row in enumerate(rows):
        values = {name: value for name, value in row.items() if name not in ("filepath", "title")}
        members |= {f"{i}.jpg": b"x", f"{i}.txt": row["title"], f"{i}.json": values}
    return write_shard(folder / "t.tar", members)


FORMATS: dict[str, Callable[..., Path]] = {
    "csv": write_csv,
    "jsonl": write_jsonl,
    "parquet": write_parquet,
    "tar": write_tar,
}


def rows_with(**columns: list[Any]) -> Rows:
    names = list(columns)
    return [
        {"filepath": f"{i}.jpg", "title": f"caption {i}", **dict(zip(names, values, strict=True))}
        for i, values in enumerate(zip(*columns.values(), strict=True))
    ]


def values_of(table: PairTable, name: str) -> list[Any]:
    return [table.column(name, row) for row in range(len(table))]


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_has_texts_verbatim_and_numbers_as_float32(kind: str, tmp_path: Path) -> None:
    texts = ["a dog", "", ' "quoted", 7 ', "犬"]
    vectors = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32).astype(float).tolist()
    columns = {
        "hard_negative": texts,
        "similarity": [0.1, -3.0, 1e-40, 2.5e38],
        "count": [3, 0, -7, 12],
        "features": vectors,
        "boxes": [[[1, 2], [3, 4]]] * 3 + [[[0.5, 0.25], [1e-7, 4]]],
    }
    table = read_table(FORMATS[kind](tmp_path, rows_with(**columns)), columns=tuple(columns))
    assert table.shapes == {"hard_negative": None, "similarity": (), "count": (), "features": (5,), "boxes": (2, 2)}
    assert values_of(table, "hard_negative") == texts
    for name in ("similarity", "count", "features", "boxes"):
        read = values_of(table, name)
        assert {array.dtype for array in read} == {np.dtype(np.float32)}
        assert np.array_equal(np.stack(read), np.array(columns[name], dtype=np.float32))
    assert [table.caption(row) for row in range(4)] == [f"caption {row}" for row in range(4)]


def test_all_parquet_types_of_numbers_and_lists_are_read(tmp_path: Path) -> None:
    values = [[1.5, -2.0], [0.1, 3e-5], [7.0, 0.0]]
    for kind in (
        pa.list_(pa.float32()), pa.list_(pa.float64()), pa.large_list(pa.float32()), pa.list_(pa.float32(), 2),
        pa.list_(pa.float16()),
    ):  # fmt: skip
        table = read_table(write_parquet(tmp_path, rows_with(x=values), x=kind), columns=("x",))
        expected = np.array(values, dtype=np.float16 if kind.value_type == pa.float16() else np.float32)
        assert np.array_equal(np.stack(values_of(table, "x")), expected.astype(np.float32))
    nested = [[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]] * 3
    for kind in (pa.list_(pa.list_(pa.float32())), pa.list_(pa.list_(pa.float32(), 3), 2)):
        table = read_table(write_parquet(tmp_path, rows_with(x=nested), x=kind), columns=("x",))
        assert np.array_equal(np.stack(values_of(table, "x")), np.array(nested))
    for kind in (pa.int8(), pa.uint64(), pa.int64()):
        table = read_table(write_parquet(tmp_path, rows_with(x=[1, 2, 3]), x=kind), columns=("x",))
        assert [float(value) for value in values_of(table, "x")] == [1, 2, 3]
    texts = write_parquet(tmp_path, rows_with(x=["a", "b", "a"]), x=pa.dictionary(pa.int32(), pa.string()))
    assert values_of(read_table(texts, columns=("x",)), "x") == ["a", "b", "a"]


def test_members_of_a_shard_are_columns_by_their_extension(tmp_path: Path) -> None:
    members: dict[str, Any] = {}
    features = np.random.default_rng(0).normal(size=(3, 2, 4)).astype(np.float32)
    for i in range(3):
        array = io.BytesIO()
        np.save(array, features[i])
        members |= {
            f"{i}.jpg": b"x", f"{i}.txt": "a caption", f"{i}.negative.txt": f"not {i}\n", f"{i}.box.json": f"[{i}, 2]",
            f"{i}.features.npy": array.getvalue(),
        }  # fmt: skip
    columns = ("negative.txt", "box.json", "features.npy")
    table = read_table(write_shard(tmp_path / "t.tar", members), columns=columns)
    assert values_of(table, "negative.txt") == ["not 0\n", "not 1\n", "not 2\n"]
    assert [value.tolist() for value in values_of(table, "box.json")] == [[0, 2], [1, 2], [2, 2]]
    assert np.array_equal(np.stack(values_of(table, "features.npy")), features)
    for damaged in (b"", b"\x93NUMPY", members["1.features.npy"][:-3]):
        file = write_shard(tmp_path / "t.tar", {**members, "1.features.npy": damaged})
        with pytest.raises(DataError, match=r"sample 2: its '1\.features\.npy' is not a \.npy file of numbers"):
            read_table(file, columns=columns)
    objects = io.BytesIO()
    np.save(objects, np.array([{}, None]), allow_pickle=True)
    file = write_shard(tmp_path / "t.tar", {**members, "1.features.npy": objects.getvalue()})
    assert read_table(file, columns=columns, on_bad_row="skip").lines.tolist() == [1, 3], "nothing is unpickled"


def test_float32_numbers_are_stored_exactly() -> None:
    bits = np.random.default_rng(0).integers(0, 1 << 32, 200_000, dtype=np.uint64).astype(np.uint32)
    numbers = bits.view(np.float32)
    numbers = np.concatenate([numbers[np.isfinite(numbers)], np.float32([0, -0.0, 1e-45, 3.4028235e38, 1 / 3])])
    stored = parse_numbers(to_json(numbers))
    assert stored is not None
    assert np.array_equal(stored.view(np.uint32), numbers.view(np.uint32))


def test_only_json_of_finite_numbers_is_numeric() -> None:
    assert shape_of(" -1.5e3") == ()
    assert shape_of("[[1, 2, 3], [4, 5, 6]]") == (2, 3)
    for text in ("", "a dog", "007", "7 dogs", "1,2", "[]", "[1, null]", '["1"]', "[1, [2]]", "NaN", "[Infinity]", "1e99", "{}", "true",
                 "[" * 100_000):  # fmt: skip
        assert shape_of(text) is None, text[:20]
    with pytest.raises(ValueError, match="unequal lists"):
        numbers_of([[1], [2, 3]])


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "tar"])
@pytest.mark.parametrize("values", [["a", None, "b"], [1.5, None, 2.0], [[1.0], None, [2.0]]])
def test_a_missing_value_makes_a_bad_row_that_names_the_column(kind: str, values: list[Any], tmp_path: Path) -> None:
    file = FORMATS[kind](tmp_path, rows_with(negative=values))
    where = LINES[kind].format(2)
    with pytest.raises(
        DataError, match=rf"{where}: .*no value of negative.*'negative'.*data\.columns.*on_bad_row=skip"
    ):
        read_table(file, columns=("negative",))
    table = read_table(file, columns=("negative",), on_bad_row="skip")
    assert table.lines.tolist() == [1, 3]
    assert table.parts[0].bad == {"no value of negative": 1}
    assert len(read_table(file)) == 3, "a column that is not requested is not read"


def test_a_missing_key_or_member_makes_a_bad_row_that_names_the_column(tmp_path: Path) -> None:
    rows = rows_with(negative=["a", "b"])
    del rows[1]["negative"]
    for kind, reported in (
        ("jsonl", r"line 2: has no key 'negative' \(data\.columns\)\. Its keys: 'filepath', 'title'"),
        ("tar", r"sample 2: no value of negative: there is no member \.negative; check data\.columns"),
    ):
        file = FORMATS[kind](tmp_path, rows)
        with pytest.raises(DataError, match=reported):
            read_table(file, columns=("negative",))
        assert read_table(file, columns=("negative",), on_bad_row="skip").parts[0].bad == {"no value of negative": 1}


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_an_unknown_column_is_an_error_with_the_nearest_name(kind: str, tmp_path: Path) -> None:
    file = FORMATS[kind](tmp_path, rows_with(hard_negative=["a", "b"]))
    with pytest.raises(
        DataError,
        match=r"has no column 'negative' \(data\.columns\).*Its columns.*'hard_negative'\. Name hard_negative in data\.columns\.",
    ):
        read_table(file, columns=("negative",))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(
    ("values", "reported"),
    [
        ([[1.0, 2.0], [1.0, 2.0, 3.0], [3.0, 4.0]], r"numbers of shape \[3\], but numbers of shape \[2\]"),
        (
            [[[1.0], [2.0]], [[1.0, 2.0], [3.0, 4.0]], [[3.0], [4.0]]],
            r"numbers of shape \[2, 2\], but numbers of shape \[2, 1\]",
        ),
    ],
)
def test_a_row_of_another_shape_is_reported_when_the_table_is_read(
    kind: str, values: list[Any], reported: str, tmp_path: Path
) -> None:
    file = FORMATS[kind](tmp_path, rows_with(features=values))
    where = LINES[kind].format(3 if kind == "csv" else 2)
    with pytest.raises(DataError, match=rf"t\.{kind}, {where}: 'features' has {reported} in the first row"):
        read_table(file, columns=("features",))
    table = read_table(file, columns=("features",), on_bad_row="skip")
    assert len(table) == 2
    assert (table.parts[0].seen, table.parts[0].bad) == (3, {"value of features unlike the first row's": 1})


@pytest.mark.parametrize("kind", ["csv", "jsonl", "tar"])
@pytest.mark.parametrize("value", ["a dog", "", [[1.0]]])
def test_a_row_that_is_not_numeric_as_the_first_is_reported(kind: str, value: Any, tmp_path: Path) -> None:
    file = FORMATS[kind](tmp_path, rows_with(score=[0.5, 0.25, value]))
    with pytest.raises(DataError, match=r"'score' has (text|numbers of shape \[1, 1\]), but a number in the first row"):
        read_table(file, columns=("score",))


def test_the_first_row_that_is_used_decides_and_later_texts_may_look_like_numbers(tmp_path: Path) -> None:
    file = write_csv(tmp_path, rows_with(negative=["1999", "a dog", "2001"], n=[0, 1, 2]))
    with pytest.raises(DataError, match=r"line 3: 'negative' has text, but a number in the first row"):
        read_table(file, columns=("negative",))
    table = read_table(file, columns=("negative",), filter="n > 0")
    assert table.shapes == {"negative": None}
    assert values_of(table, "negative") == ["a dog", "2001"]


@pytest.mark.parametrize("kind", ["jsonl", "tar"])
@pytest.mark.parametrize(
    ("value", "reported"),
    [
        (["a", "b"], "a list of other values than numbers"),
        ([1, None], "a list of other values than numbers"),
        ([[1], [2, 3]], "a list of unequal lists"),
        ([], "an empty list"),
        ([1e39], "too large for float32"),
        ([float("nan")], "NaN"),
        ({"a": 1}, "not text but an object"),
        (True, "not text but a truth value"),
    ],
)
def test_values_that_are_neither_texts_nor_numbers_make_bad_rows(
    kind: str, value: Any, reported: str, tmp_path: Path
) -> None:
    file = FORMATS[kind](tmp_path, rows_with(x=[[1.0], value]))
    with pytest.raises(DataError, match=rf"{LINES[kind].format(2)}: the value of 'x' is .*{reported}"):
        read_table(file, columns=("x",))


def test_parquet_columns_of_other_types_are_refused(tmp_path: Path) -> None:
    for values in ([True, False], [{"a": 1}, {"a": 2}], [["a"], ["b"]], [b"a", b"b"]):
        file = write_parquet(tmp_path, rows_with(x=values))
        with pytest.raises(DataError, match=r"'x' \(data\.columns\) is of type .*must be strings, numbers or lists"):
            read_table(file, columns=("x",))
    nulls = write_parquet(tmp_path, rows_with(x=[[1.0, None], [1.0, 2.0]]))
    with pytest.raises(DataError, match=r"row 1: the value of 'x' is NaN"):
        read_table(nulls, columns=("x",))


def test_long_lists_of_numbers_are_read_from_text(tmp_path: Path) -> None:
    """A caption may have 32,768 characters."""
    vectors = np.random.default_rng(0).normal(size=(2, 4096)).astype(np.float32)
    cells = [to_json(vector) for vector in vectors]
    assert len(cells[0]) > 40_000
    table = read_table(write_csv(tmp_path, rows_with(x=cells)), columns=("x",))
    assert np.array_equal(np.stack(values_of(table, "x")), vectors)
