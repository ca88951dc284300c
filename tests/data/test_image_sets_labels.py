"""Labels are read in the same way everywhere."""

import json
import logging

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clip_exp.data.image_sets import label_of_images, warn_similar_labels
from clip_exp.data.tables.open import read_table
from clip_exp.errors import DataError
from tests.data.conftest import write_table
from tests.data.tables.shard_files import write_shard

WRITTEN = ("cat", " cat\t", "\u00a0cat\u3000", "\u200bcat\ufeff", "guinea  pig", "\u2003", "")
READ = ["cat"] * 4 + ["guinea  pig", "", ""]


def files(folder):
    rows = [{"filepath": f"{i}.png", "title": " x ", "label": label} for i, label in enumerate(WRITTEN)]
    yield write_table(folder / "t.csv", [list(rows[0]), *(list(row.values()) for row in rows)])
    (folder / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    yield folder / "t.jsonl"
    pq.write_table(pa.Table.from_pylist(rows), folder / "t.parquet")
    yield folder / "t.parquet"
    members = [{f"{i}.png": b"x", f"{i}.txt": " x ", f"{i}.cls": label} for i, label in enumerate(WRITTEN)]
    yield write_shard(folder / "t.tar", {name: value for each in members for name, value in each.items()})


def test_labels_lose_the_blanks_around_them_in_every_format_and_captions_do_not(tmp_path):
    for file in files(tmp_path):
        table = read_table(file, label_key="cls" if file.suffix == ".tar" else "label")
        assert [table.label(row) for row in range(len(table))] == READ, file
        assert label_of_images(table) == READ
        assert {table.caption(row) for row in range(len(table))} == {" x "}


def test_an_image_has_the_label_of_those_rows_that_have_one_and_no_second_one(tmp_path):
    rows = [
        ["filepath", "title", "label"],
        ["a.png", "x", ""],
        ["b.png", "x", "dog"],
        ["./a.png", "y", "cat "],
        ["c.png", "x", ""],
    ]
    table = write_table(tmp_path / "t.csv", rows)
    assert label_of_images(read_table(table, label_key="label")) == ["cat", "dog", ""]
    write_table(table, [*rows, ["a.png", "z", "cat"], ["b.png", "z", "cat"]])
    with pytest.raises(
        DataError,
        match=r"line 7: the label of b\.png is 'cat' here, but 'dog' in .*t\.csv, line 3\. Give each image one label",
    ):
        label_of_images(read_table(table, label_key="label"))


def test_labels_that_differ_in_case_or_blanks_alone_are_reported(caplog):
    with caplog.at_level(logging.WARNING):
        warn_similar_labels(["dog", "cat", "ice cream", "bird"], "a.csv")
        assert not caplog.records
        warn_similar_labels(["Dog", "ice cream", "dog", "icecream", "dog", "ice\u00a0cream", "cat"], "a.csv")
    (record,) = caplog.records
    assert record.getMessage().startswith("a.csv: 5 labels differ only in case or blanks")
    assert "'Dog' and 'dog'; 'ice cream' and 'icecream' and 'ice\\xa0cream'" in record.getMessage()
