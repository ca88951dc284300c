import csv
import logging
import subprocess
import sys
import time
from pathlib import Path

import pytest

from clip_exp.data.tables.open import read_table
from clip_exp.data.tables.table import PairTable
from clip_exp.errors import ConfigError, DataError
from tests.data.conftest import write_table

HEADER = ["filepath", "title"]


def columns(table: PairTable) -> list[tuple[str, str]]:
    return [(table.path(i), table.caption(i)) for i in range(len(table))]


def write(file: Path, text: str | bytes) -> Path:
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


@pytest.mark.parametrize("separator", [",", "\t", ";", "|"])
def test_separator_is_found_out(tmp_path, separator):
    rows = [["a.jpg", "one, two; three | four"], ["b.jpg", "tab\there"], ["c.jpg", 'with "quotes"']]
    table = read_table(write_table(tmp_path / "t.csv", [HEADER, *rows], separator))
    assert columns(table) == [tuple(row) for row in rows]


def test_flagai_layout_is_read_unchanged(tmp_path):
    file = write(
        tmp_path / "pairs.csv", "title\tfilepath\na very typical bus station\t0.jpg\nthe sky, with clouds\t1.jpg\n"
    )
    table = read_table(file, image_root=tmp_path / "img")
    assert columns(table) == [("0.jpg", "a very typical bus station"), ("1.jpg", "the sky, with clouds")]
    assert table.image_path(1) == str(tmp_path / "img" / "1.jpg")


def test_real_tables_are_read_whole(real_data):
    flickr = read_table(real_data / "flickr8k" / "train.csv")
    assert len(flickr) == 10_000
    assert int(flickr.image_index().max()) + 1 == 2000
    assert Path(flickr.image_path(0)).is_file()
    assert len(read_table(real_data / "flagai_layout" / "pairs.csv")) == 20


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("separator", [",", "\t"])
def test_two_columns_without_header_are_recognized_by_names_of_images(tmp_path, swapped, separator):
    rows = [("images/a.JPG", "first caption"), ("images/b.png", "second, with comma"), ("c.webp", "third")]
    file = write_table(tmp_path / "t.csv", [list(row[::-1] if swapped else row) for row in rows], separator)
    assert columns(read_table(file)) == rows


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_unicode_encodings_are_found_out(tmp_path, encoding, caplog):
    rows = [
        ["a.jpg", "a plain caption of some length"],
        ["b.jpg", "naïve café 猫 🐈"],
        ["c.jpg", "line\u2028separator\x85next"],
    ]
    file = write_table(tmp_path / "t.csv", [HEADER, *rows], encoding=encoding)
    assert columns(read_table(file)) == [tuple(row) for row in rows]
    assert not caplog.records


@pytest.mark.parametrize(
    ("encoding", "captions"),
    [
        (
            "cp1252",
            ["une journée d'été à la plage", "un garçon mange une crêpe", "deux élèves très âgés près de la forêt"],
        ),
        ("gb18030", ["一只黑白相间的狗在长满青草的花园里奔跑", "两个孩子在海滩上玩耍", "一个穿蓝色短裤的男人躺在街上"]),
    ],
)
def test_other_encodings_are_guessed_and_named_in_a_warning(tmp_path, encoding, captions, caplog):
    file = write_table(
        tmp_path / "t.csv", [HEADER, *[[f"{i}.jpg", c] for i, c in enumerate(captions)]], encoding=encoding
    )
    with caplog.at_level(logging.WARNING):
        assert [caption for _, caption in columns(read_table(file))] == captions
    assert "is not UTF-8; reading it as" in caplog.text


def test_a_stated_encoding_is_used_and_must_fit(tmp_path):
    file = write_table(tmp_path / "t.csv", [HEADER, ["a.jpg", "été"]], encoding="latin-1")
    assert read_table(file, encoding="latin-1").caption(0) == "été"
    with pytest.raises(DataError, match=r"not UTF-8.*data\.encoding"):
        read_table(file, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"data\.encoding=klingon"):
        read_table(file, encoding="klingon")


def test_captions_stay_verbatim(tmp_path):
    captions = [
        "null",
        "NA",
        "None",
        "nan",
        "",
        "007",
        "1e5",
        "True",
        " spaces ",
        'say "hi"',
        "two\nlines",
        "cr\r\nlf",
        "'",
    ]
    file = write_table(tmp_path / "t.csv", [HEADER, *[[f"{i}.jpg", c] for i, c in enumerate(captions)]])
    assert [caption for _, caption in columns(read_table(file))] == captions


def test_embedded_newlines_keep_rows_and_lines_apart(tmp_path):
    file = write(tmp_path / "t.csv", 'filepath,title\na.jpg,"one\ntwo, three"\nb.jpg,next\n\nc.jpg,"last\n\n"\n')
    table = read_table(file)
    assert columns(table) == [("a.jpg", "one\ntwo, three"), ("b.jpg", "next"), ("c.jpg", "last\n\n")]
    assert [table.where(i) for i in range(3)] == [f"{file}, line {line}" for line in (2, 4, 6)]


def test_classic_mac_line_ends_are_lines(tmp_path):
    assert columns(read_table(write(tmp_path / "t.csv", "filepath,title\ra.jpg,x\rb.jpg,y\r"))) == [
        ("a.jpg", "x"),
        ("b.jpg", "y"),
    ]


def test_a_missing_column_is_reported_with_the_columns_and_the_key_to_set(tmp_path):
    file = write_table(tmp_path / "t.csv", [["file_path", "title", "score"], ["a.jpg", "x", "1"]])
    with pytest.raises(DataError) as error:
        read_table(file)
    for part in (
        "no column 'filepath'",
        "'file_path', 'title', 'score'",
        "Set data.image_key=file_path",
        "comma",
        str(file),
    ):
        assert part in str(error.value)
    with pytest.raises(DataError, match="no column 'label'"):
        read_table(file, image_key="file_path", label_key="label")
    assert read_table(file, image_key="file_path").path(0) == "a.jpg"


def test_a_wrong_separator_is_reported(tmp_path):
    file = write_table(tmp_path / "t.csv", [HEADER, ["a.jpg", "x"]])
    with pytest.raises(DataError, match=r"separator seems to be comma: set data\.separator=auto"):
        read_table(file, separator="\\t")
    with pytest.raises(ConfigError, match=r"data\.separator"):
        read_table(file, separator="::")
    file.write_text("filepath:title\na.jpg:x\n")
    with pytest.raises(DataError, match=r"set data\.separator to the character between"):
        read_table(file)
    assert read_table(file, separator=":").caption(0) == "x"


def test_a_column_that_is_there_twice_is_refused(tmp_path):
    with pytest.raises(DataError, match="2 columns named 'title'"):
        read_table(write_table(tmp_path / "t.csv", [["filepath", "title", "title"], ["a.jpg", "x", "y"]]))


RAGGED = "filepath,title\na.jpg,x\nb.jpg,y, and more\nc.jpg\nd.jpg,z\n"


def test_a_ragged_row_is_reported_with_its_line(tmp_path):
    with pytest.raises(
        DataError, match=r"t\.csv, line 3: 3 fields instead of 2, separated by comma.*data\.on_bad_row=skip"
    ):
        read_table(write(tmp_path / "t.csv", RAGGED))


def test_ragged_rows_are_left_out_and_counted(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        table = read_table(write(tmp_path / "t.csv", RAGGED), on_bad_row="skip")
    assert columns(table) == [("a.jpg", "x"), ("d.jpg", "z")]
    assert table.skipped == 2
    assert table.where(1).endswith("line 5")
    assert "2 bad rows" in caplog.text


def test_an_unclosed_quote_swallows_no_rows(tmp_path):
    lines = ["title\tfilepath", *(f"caption {i}\t{i}.jpg" for i in range(1500))]
    lines[700] = '"unclosed caption\t699.jpg'
    lines[900] = '"Hi" he said\t899.jpg'
    lines[1500] = '"open at the end\t1499.jpg'
    table = read_table(write(tmp_path / "t.csv", "\n".join(lines)))
    assert len(table) == 1500
    assert [table.path(i) for i in range(1500)] == [f"{i}.jpg" for i in range(1500)]
    assert [table.caption(i) for i in (699, 899, 1499)] == ['"unclosed caption', '"Hi" he said', '"open at the end']


def test_an_unclosed_quote_with_a_wrong_number_of_fields_is_a_bad_row(tmp_path):
    file = write(tmp_path / "t.csv", 'filepath,title\na.jpg,x\nb.jpg,"open, here\nc.jpg,"closed"\n')
    with pytest.raises(DataError, match="line 3: broken quotes"):
        read_table(file)
    assert columns(read_table(file, on_bad_row="skip")) == [("a.jpg", "x"), ("c.jpg", "closed")]


@pytest.mark.parametrize("text", ["", "\n\n", "filepath,title\n", "\ufefffilepath,title"])
def test_a_table_without_rows_is_refused(tmp_path, text):
    with pytest.raises(DataError, match=r"empty|no rows"):
        read_table(write(tmp_path / "t.csv", text))


def test_missing_files_and_addresses_are_configuration_errors(tmp_path):
    for table in (tmp_path / "missing.csv", tmp_path, "https://example.com/pairs.csv", []):
        with pytest.raises(ConfigError):
            read_table(table)


def test_several_tables_are_one_with_a_root_each(tmp_path):
    files = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        files.append(write_table(tmp_path / name / "t.csv", [HEADER, ["a.jpg", name], ["b.jpg", "x"]]))
    table = read_table(files)
    assert [Path(table.image_path(i)).parent.name for i in range(4)] == ["one", "one", "two", "two"]
    assert table.image_index().tolist() == [0, 1, 2, 3]
    assert table.where(3) == f"{files[1]}, line 3"
    shared = read_table(files, image_root=tmp_path)
    assert shared.image_index().tolist() == [0, 1, 0, 1]
    assert len(read_table(files, max_rows=3)) == 3
    assert len(read_table(files, max_rows=2)) == 2


def test_captions_are_optional_and_labels_are_read(tmp_path):
    file = write_table(tmp_path / "t.csv", [["label", "filepath"], ["cat", "a.jpg"], ["", "b.jpg"]])
    table = read_table(file, caption_key=None, label_key="label")
    assert [(table.path(i), table.label(i)) for i in range(2)] == [("a.jpg", "cat"), ("b.jpg", "")]
    with pytest.raises(ValueError, match="without captions"):
        table.caption(0)


def test_two_hundred_thousand_rows_take_a_few_times_as_long_as_parsing_and_stay_in_arrow(tmp_path):
    text = "filepath,title\n" + "".join(
        f'images/{i:08d}.jpg,"a caption, number {i}, of a usual length"\n' for i in range(200_000)
    )
    file = write(tmp_path / "t.csv", text)
    started_s = time.process_time()
    for _ in csv.reader(text.splitlines()):
        pass
    parsed_s = time.process_time()
    table = read_table(file)
    assert time.process_time() - parsed_s < 20 * (parsed_s - started_s)
    assert len(table) == 200_000
    assert table.where(199_999).endswith("line 200001")
    assert table.paths.nbytes + table.captions.nbytes < 2 * len(text)


def test_reading_a_table_imports_neither_torch_nor_pandas(tmp_path):
    file = write_table(tmp_path / "t.csv", [HEADER, ["a.jpg", "x"]])
    code = (
        "import sys, clip_exp.data.generated; from pathlib import Path; from clip_exp.data.tables.open import open_table; "
        "from clip_exp.data.tables.reader import TableOptions; "
        f"open_table({str(file)!r}, TableOptions(), index_dir=Path({str(tmp_path)!r})).image_index(); sys.exit(bool({{'torch', 'pandas', 'sklearn'}} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
