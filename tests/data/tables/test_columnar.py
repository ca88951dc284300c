from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clip_exp.config.data import OnBadRow
from clip_exp.data.tables import columnar
from clip_exp.data.tables.open import read_table
from clip_exp.data.tables.reader import TableOptions
from clip_exp.errors import DataError


def write(file, columns: dict, **options: object):
    pq.write_table(pa.table(columns) if isinstance(columns, dict) else columns, file, **options)
    return file


def captions(table):
    return [table.caption(row) for row in range(len(table))]


WRITTEN = ["null", "NA", "007", "", " a  dog\t", "line\nbreak", 'a "quote"', "犬 🐕", "a dog", "a dog"]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_captions_are_read_verbatim_from_every_column_of_text(tmp_path, kind):
    paths = [f"{i}.jpg" for i in range(len(WRITTEN))]
    columns = {
        "title": pa.array(WRITTEN).cast(kind),
        "more": [{"x": 1}] * len(WRITTEN),
        "filepath": pa.array(paths).cast(kind),
    }
    for suffix in (".parquet", ".pq"):
        table = read_table(write(tmp_path / f"t{suffix}", columns, row_group_size=3))
        assert captions(table) == WRITTEN
        assert [table.path(row) for row in range(len(table))] == paths
        assert table.where(7) == f"{tmp_path / f't{suffix}'}, row 8"


def raw_text(*values: bytes | None) -> pa.Array:
    """Return a string array that may contain invalid UTF-8."""
    return pa.Array.from_buffers(pa.string(), len(values), pa.array(values, pa.binary()).buffers())


BAD = [
    ("title", None, "no caption", "no caption .*'title' is missing or null"),
    ("filepath", None, "no image path", "no image path"),
    ("filepath", b"", "no image path", "'filepath' is empty"),
    ("title", b"x\0y", "NUL character", "contains a NUL character"),
    ("title", b"x" * 32_769, "caption too long", "32,769 characters, more than 32,768"),
    ("title", b"\xe9t\xe9", "not UTF-8", "is not UTF-8"),
]


@pytest.mark.parametrize(("column", "value", "reason", "reported"), BAD)
def test_a_bad_row_is_reported_with_its_number_or_left_out_by_reason(tmp_path, column, value, reason, reported):
    columns = {"filepath": raw_text(b"a.jpg", b"b.jpg", b"c.jpg"), "title": raw_text(b"x", b"y", "é".encode() * 32_768)}
    values = [b"x", value, b"z"]
    file = write(tmp_path / "t.parquet", {**columns, column: raw_text(*values), "n": [1, 2, 3]})
    with pytest.raises(DataError, match=rf"t\.parquet, row 2: .*{reported}.*data\.on_bad_row=skip"):
        read_table(file)
    table = read_table(file, on_bad_row="skip", filter="n >= 2")
    assert (len(table), table.lines.tolist()) == (1, [3])
    assert (table.parts[0].bad, table.parts[0].bad_examples) == ({reason: 1}, ((2, reason),))


@pytest.mark.parametrize(
    ("columns", "reported"),
    [
        (
            {"file_path": ["a"], "title": ["x"]},
            r"no column 'filepath' \(data.image_key\).*Set data.image_key=file_path",
        ),
        (
            {"filepath": [1], "title": ["x"]},
            r"'filepath' \(data.image_key\) is of type int64.*or images: binary, or a struct",
        ),
        (
            {"filepath": ["a"], "title": [{"x": 1}]},
            r"'title' \(data.caption_key\) is of type struct.*captions must be strings",
        ),
        ({"filepath": ["a"], "title": [7]}, r"'title' \(data.caption_key\) is of type int64"),
        (
            {"filepath": ["a"], "title": [[1, 2]]},
            "is of type list<.*>, but captions must be strings or lists of strings",
        ),
        (pa.table([["a"], ["x"], ["y"]], ["filepath", "title", "title"]), "has 2 columns named 'title'"),
        ({"filepath": pa.array([], pa.string()), "title": pa.array([], pa.string())}, "no rows"),
    ],
)
def test_columns_that_cannot_be_used_are_reported(tmp_path, columns, reported):
    with pytest.raises(DataError, match=reported):
        read_table(write(tmp_path / "t.parquet", columns))


def test_names_with_dots_are_names(tmp_path):
    """Arrow also interprets them as paths into structs."""
    columns = {"a.b": ["a.jpg"], "meta": [{"title": "inner"}], "meta.title": ["outer"], "meta.width": [3]}
    options = {"image_key": "a.b", "caption_key": "meta.title"}
    file = write(tmp_path / "t.parquet", columns)
    assert captions(read_table(file, **options, filter='"meta.width" = 3')) == ["outer"]


def test_labels_may_be_whole_numbers_and_none(tmp_path):
    for labels, read in ((["cat", None, ""], ["cat", "", ""]), ([7, None, -1], ["7", "", "-1"])):
        file = write(tmp_path / "t.parquet", {"filepath": ["a", "b", "c"], "label": labels})
        table = read_table(file, caption_key=None, label_key="label")
        assert [table.label(row) for row in range(3)] == read
    with pytest.raises(DataError, match="is of type double, but labels must be strings or integers"):
        read_table(
            write(tmp_path / "t.parquet", {"filepath": ["a"], "label": [1.5]}), caption_key=None, label_key="label"
        )


def test_a_filter_sees_the_types_of_the_columns(tmp_path):
    columns = {
        "filepath": ["a", "b", "c"], "title": ["a dog", "a cat", "the dog"],
        "width": pa.array([300, None, 200], pa.uint16()), "score": pa.array([0.3, 0.2, float("nan")], pa.float32()),
        "price": [Decimal("1.50"), Decimal("2.50"), None], "safe": [True, False, None], "tags": [["x"], [], None],
        "struct": [{"x": 1}] * 3,
    }  # fmt: skip
    file = write(tmp_path / "t.parquet", columns)
    expected = {
        "width >= 256": "a", "score != 5": "ab", "price > 2": "b", "safe = true": "a", "NOT safe": "b",
        "'x' in tags": "a", "len(tags) = 0": "b", "title LIKE '%dog%' AND NOT width > 250": "c",
    }  # fmt: skip
    for condition, paths in expected.items():
        table = read_table(file, filter=condition)
        assert [table.path(row) for row in range(len(table))] == list(paths), condition
    with pytest.raises(DataError, match=r"has no column 'hight' \(data.filter\)"):
        read_table(file, filter="hight > 3")
    with pytest.raises(DataError, match=r"'struct'.*which a filter cannot compare"):
        read_table(file, filter="struct = 'x'")


def test_a_file_cut_anywhere_is_refused_and_never_read_in_part(tmp_path):
    rows = 2_000
    columns = {"filepath": [f"{i}.jpg" for i in range(rows)], "title": [f"caption {i}" for i in range(rows)]}
    whole = write(tmp_path / "t.parquet", columns, row_group_size=500).read_bytes()
    cut = tmp_path / "cut.parquet"
    for part in range(1, 16):
        cut.write_bytes(whole[: len(whole) * part // 16])
        with pytest.raises(DataError, match=r"cut\.parquet cannot be read as Parquet"):
            read_table(cut, on_bad_row="skip")


def test_damage_anywhere_is_an_error_with_a_message_or_changes_nothing_but_text(tmp_path):
    columns = {"filepath": [f"{i}.jpg" for i in range(300)], "title": [f"caption {i}" for i in range(300)]}
    whole = bytearray(write(tmp_path / "t.parquet", columns, compression="zstd").read_bytes())
    refused = []
    for position in range(0, len(whole), 97):
        damaged = bytearray(whole)
        damaged[position : position + 3] = b"\xff\x00\xa5"
        (tmp_path / "t.parquet").write_bytes(damaged)
        try:
            assert len(read_table(tmp_path / "t.parquet", on_bad_row="skip")) <= 300
        except DataError as error:
            refused.append(str(error))
    assert len(refused) > 3
    assert not any("\n" in message for message in refused)


def most_memory(reader: columnar.ParquetReader) -> int:
    """Return the maximum memory of Arrow at the end of a block, in bytes."""
    before = pa.total_allocated_bytes()
    return max(pa.total_allocated_bytes() - before for _ in reader.blocks())


def test_a_large_row_group_is_read_piece_by_piece(tmp_path, monkeypatch):
    """Different captions, one of them long. As a dictionary, they would be collected again for every batch."""
    texts = pa.array([f"a caption that is like no other one, number {i}" for i in range(200_000)])
    texts = pa.concat_arrays([pa.array(["x" * 150_000]), texts[1:]])
    file = write(tmp_path / "t.parquet", {"filepath": ["a.jpg"] * 200_000, "title": texts}, compression="none")
    del texts
    monkeypatch.setattr(columnar, "_SMALL_BYTES", 1 << 20)
    reader = columnar.ParquetReader(file, TableOptions(on_bad_row=OnBadRow.skip))
    assert most_memory(reader) < 8 << 20
    assert reader.bad.counts == {"caption too long": 1}
    assert reader.bytes_read == file.stat().st_size


def test_huge_texts_come_a_few_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(columnar, "_BLOCK_BYTES", 1_000_000)
    columns = {"filepath": ["a.jpg"] * 500, "title": ["x" * 100_000] * 500}
    for coded in (True, False):
        file = write(tmp_path / "t.parquet", columns, compression="zstd", use_dictionary=coded, write_batch_size=10)
        reader = columnar.ParquetReader(file, TableOptions(on_bad_row=OnBadRow.skip))
        assert most_memory(reader) < 8 << 20
        assert reader.bad.counts == {"caption too long": 500}


def test_a_small_file_of_huge_captions_does_not_fill_the_memory(tmp_path):
    """A file with the same megabyte a thousand times takes less than a kilobyte."""
    said = pa.DictionaryArray.from_arrays(pa.array([0] * 1000 + [1]), ["x" * 1_000_000, "a dog"])
    columns = {"filepath": ["a.jpg"] * 1000 + ["b.jpg"], "title": said}
    file = write(tmp_path / "t.parquet", columns, compression="zstd", store_schema=False)
    assert file.stat().st_size < 2000
    before, pool = pa.default_memory_pool(), pa.system_memory_pool()
    pa.set_memory_pool(pool)
    try:
        table = read_table(file, on_bad_row="skip")
    finally:
        pa.set_memory_pool(before)
    assert captions(table) == ["a dog"]
    assert table.parts[0].bad == {"caption too long": 1000}
    assert pool.max_memory() < 100_000_000
    with pytest.raises(DataError, match=r"row 1: the caption 'title' has more than 131,072 bytes"):
        read_table(file)
