import gzip

import pytest

from clip_exp.data.tables.open import is_shard, read_table
from clip_exp.data.tables.reader import TableOptions
from clip_exp.data.tables.scan import open_reader
from clip_exp.errors import ConfigError
from tests.data.tables.shard_files import write_shard


@pytest.mark.parametrize(
    ("name", "content", "reported"),
    [
        ("t.csv.gz", b"x", r"is compressed.*decompress it \(gunzip .*t\.csv\.gz\)"),
        ("t.tar.gz", b"x", "is compressed"),
        ("t.tar.zst", b"x", r"\(unzstd "),
        ("t.xlsx", b"x", "is an Excel workbook, which is not supported: convert it to CSV"),
        ("t.feather", b"x", "is a Feather file"),
        ("t.pkl", b"x", "is a pickle, which is not supported"),
        ("t.csv", b"PAR1xxxx", r"has the extension of text, but its content is Parquet: rename it to t\.parquet"),
        ("t.jsonl", b"PAR1xxxx", "has the extension of JSON, but its content is Parquet"),
        ("t.tsv", gzip.compress(b"x", mtime=0), r"is compressed by gzip \(decompress it: gunzip\)"),
        ("t.tar", gzip.compress(b"x", mtime=0), "has the extension of a shard, but its content is compressed by gzip"),
        ("t.txt", b"PK\x03\x04", "is a ZIP archive or an Excel workbook"),
        ("t.parquet", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("t.csv", b"\xff\xd8\xff\xe0", "is a JPEG image"),
    ],
)
def test_files_that_are_no_table_are_refused_with_the_repair(tmp_path, name, content, reported):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=reported):
        open_reader(tmp_path / name, TableOptions())


def test_a_tar_is_reported_by_its_content_whatever_it_is_called(tmp_path):
    file = write_shard(tmp_path / "s.csv", {"1.jpg": b"x", "1.txt": "x"})
    with pytest.raises(ConfigError, match=r"is a tar: rename it to s\.tar"):
        read_table(file)
    assert is_shard(tmp_path / "s.TAR")
    assert not is_shard(file)


def test_other_names_are_delimited_text(tmp_path):
    for name in ("t", "t.dat", "t.csv.backup"):
        (tmp_path / name).write_text("filepath,title\na.jpg,a dog\n")
        assert read_table(tmp_path / name).caption(0) == "a dog"


def test_shards_and_tables_are_not_one_table(tmp_path):
    shard = write_shard(tmp_path / "s.tar", {"1.jpg": b"x", "1.txt": "x"})
    (tmp_path / "t.csv").write_text("filepath,title\na.jpg,a dog\n")
    for files in ([shard, tmp_path / "t.csv"], [tmp_path / "t.csv", shard]):
        with pytest.raises(ConfigError, match=r"s\.tar is a shard and .*t\.csv is not.*separate sources"):
            read_table(files)
