"""Delimited text: the fast path and the strict reader return the same rows, and errors have the line."""

import logging
import random
from pathlib import Path

import pytest

from clip_exp.data.tables import delimited, lines
from clip_exp.data.tables.open import read_table
from clip_exp.data.tables.reader import MAX_CAPTION
from clip_exp.data.tables.table import PairTable
from clip_exp.errors import ClipExpError, ConfigError, DataError

Rows = list[tuple[str, str, int]]


def write(file: Path, text: str | bytes) -> Path:
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def columns(table: PairTable) -> list[tuple[str, str]]:
    return [(table.path(row), table.caption(row)) for row in range(len(table))]


def random_table(draw: random.Random) -> bytes:
    """Return a table of a random dialect, usually with faults."""
    separator, end = draw.choice(",\t;|"), draw.choice(["\n", "\n", "\r\n", "\r", None])
    faults, quoted = draw.choice([0, 0, 0.02, 0.2]), draw.choice([0, 0.2, 1])
    usual = ["a", "b c", "é", "猫", " ", "x" * 9, "\u2028", "\x85", "\x1a", "'"]
    unusual = [
        '"',
        '""',
        "\n",
        "\r",
        "\r\n",
        "\0",
        separator,
        "\ufeff",
        "\udcff",
        separator + '"',
        '"' + separator,
        '\n"',
    ]

    def text() -> str:
        return "".join(draw.choice(unusual if draw.random() < faults else usual) for _ in range(draw.randint(0, 6)))

    def field() -> str:
        if draw.random() >= quoted:
            return text()
        inside = text() + draw.choice(["", separator, "\n", end or "\n", '"'])
        return '"' + (inside if draw.random() < faults else inside.replace('"', '""')) + '"'

    width = draw.choice([2, 2, 3])
    parts = [separator.join(["filepath", "title", "score"][:width]) + (end or "\n")]
    for row in range(draw.randint(1, 50)):
        fields = [f"{row}.jpg" if draw.random() < 0.95 else field(), *(field() for _ in range(width - 1))]
        fields += ["more"] * (draw.random() < faults)
        parts.append(separator.join(fields) + (end or draw.choice(["\n", "\r\n", "\r"])))
        parts.append(draw.choice(["\n", "  \n", "\r\n"]) if draw.random() < faults else "")
    whole = "".join(parts)
    return (whole if draw.random() < 0.7 else whole.rstrip("\r\n")).encode("utf-8", "surrogateescape")


def found_in(file: Path, on_bad_row: str) -> tuple[Rows, dict[str, int], tuple[tuple[int, str], ...]] | str:
    try:
        table = read_table(file, on_bad_row=on_bad_row)
    except ClipExpError as error:
        return str(error)
    rows = [(*pair, int(line)) for pair, line in zip(columns(table), table.lines, strict=True)]
    return rows, table.parts[0].bad, table.parts[0].bad_examples


@pytest.mark.parametrize("block_bytes", [60, 400, 1 << 19])
def test_the_fast_way_reads_what_the_strict_reader_reads(tmp_path, monkeypatch, block_bytes):
    parse_block, used = delimited.parse_block, []
    for seed in range(150):
        file = write(tmp_path / "t.csv", random_table(random.Random(seed)))
        for on_bad_row in ("skip", "error"):
            monkeypatch.setattr(lines, "_BLOCK", block_bytes)
            monkeypatch.setattr(
                delimited, "parse_block", lambda *args: used.append(found := parse_block(*args)) or found
            )
            fast = found_in(file, on_bad_row)
            monkeypatch.setattr(lines, "_BLOCK", 1 << 19)
            monkeypatch.setattr(delimited, "parse_block", lambda *_: None)
            assert fast == found_in(file, on_bad_row), f"seed {seed}"
    assert sum(map(bool, used)) > 20


def test_usual_tables_are_read_the_fast_way(tmp_path, monkeypatch):
    parsed: list[bool] = []
    parse_block = delimited.parse_block
    monkeypatch.setattr(
        delimited, "parse_block", lambda *args: parsed.append(bool(found := parse_block(*args))) or found
    )
    captions = ['"a, b"', '"two\nlines"', '"say ""hi"""', '""', '""""', "plain", "naïve 猫"]
    quoted = write(
        tmp_path / "quoted.csv", "filepath,title\n" + "".join(f"{i}.jpg,{c}\n" for i, c in enumerate(captions))
    )
    assert [caption for _, caption in columns(read_table(quoted))] == [
        "a, b", "two\nlines", 'say "hi"', "", '"', "plain", "naïve 猫",
    ]  # fmt: skip
    inches = write(tmp_path / "inches.tsv", 'filepath\ttitle\na.jpg\ta 5" pipe\r\nb.jpg\tthe "best" one\r\n')
    assert [caption for _, caption in columns(read_table(inches))] == ['a 5" pipe', 'the "best" one']
    assert parsed == [True, True]


def test_lines_are_exact_across_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "_BLOCK", 100)
    text, expected, line = "filepath,title\n", [], 2
    for row in range(200):
        newlines = row % 4
        caption = '"' + "x\n" * newlines + '"' if row % 3 else 'broken" quote' if row % 2 else "plain"
        text += f"{row}.jpg,{caption}\n" + "\n" * (row % 50 == 0)
        expected.append(line)
        line += 1 + newlines * bool(row % 3) + (row % 50 == 0)
    table = read_table(write(tmp_path / "t.csv", text))
    assert table.lines.tolist() == expected


BAD_ROWS = {
    "NUL character": b"b.jpg,nul \0 here",
    "not UTF-8": b"b.jpg,caf\xe9",
    "no image path": b",no path",
    "caption too long": b"b.jpg," + b"x" * (MAX_CAPTION + 1),
    "wrong number of fields": b"b.jpg,x,y",
    "broken quotes": b'b.jpg,"open, here',
}


@pytest.mark.parametrize("reason", BAD_ROWS)
def test_each_kind_of_bad_row_is_named_with_its_line_or_left_out_and_counted(tmp_path, reason):
    good = "é.jpg,ünïcödé\n".encode() * 3
    file = write(tmp_path / "t.csv", b"filepath,title\n" + good + BAD_ROWS[reason] + b"\n" + good)
    with pytest.raises(DataError, match=r"t\.csv, line 5: .*data\.on_bad_row=skip"):
        read_table(file)
    table = read_table(file, on_bad_row="skip")
    assert columns(table) == [("é.jpg", "ünïcödé")] * 6
    assert table.parts[0].bad == {reason: 1}
    assert table.parts[0].bad_examples == ((5, reason),)


def test_a_ten_megabyte_field_is_one_bad_row(tmp_path):
    fields = {"caption too long": "x" * 10_000_000, "field too long": '"' + "x, " * 3_000_000 + '"'}
    for reason, caption in fields.items():
        file = write(tmp_path / "t.csv", f"filepath,title\na.jpg,one\nb.jpg,{caption}\nc.jpg,two\n")
        table = read_table(file, on_bad_row="skip")
        assert columns(table) == [("a.jpg", "one"), ("c.jpg", "two")]
        assert table.parts[0].bad == {reason: 1}


def test_control_characters_and_unicode_line_ends_are_text(tmp_path):
    captions = ["sub \x1a here", "line\u2028separator", "next\x85line", "form\x0cfeed", "zero\u200bwidth", "\ufeffmark"]
    file = write(tmp_path / "t.csv", "filepath,title\n" + "".join(f"a.jpg,{caption}\n" for caption in captions))
    assert [caption for _, caption in columns(read_table(file))] == captions


def test_one_bad_byte_does_not_turn_a_utf8_table_into_another_encoding(tmp_path, caplog):
    rows = [b"%d.jpg,caf\xc3\xa9 number %d\n" % (i, i) for i in range(50)]
    rows[20] = b"20.jpg,caf\xe9 number 20\n"
    file = write(tmp_path / "t.csv", b"filepath,title\n" + b"".join(rows))
    with pytest.raises(DataError, match="line 22: the row is not UTF-8: it contains the byte 0xe9"):
        read_table(file)
    table = read_table(file, on_bad_row="skip")
    assert columns(table) == [(f"{i}.jpg", f"café number {i}") for i in range(50) if i != 20]
    assert "read as" not in caplog.text


def test_a_byte_outside_another_encoding_is_named_with_its_offset(tmp_path):
    text = (
        "filepath,title\na.jpg,x\n".encode("utf-16")
        + "b.jpg,".encode("utf-16-le")
        + b"\x00\xd8"
        + "\n".encode("utf-16-le")
    )
    with pytest.raises(DataError, match=r"about line 3: byte 0x00 at offset 60 is not valid utf-16"):
        read_table(write(tmp_path / "t.csv", text))
    with pytest.raises(DataError, match=r"about line 2: byte 0x81 at offset 21 is not valid cp1252.*data\.encoding"):
        read_table(write(tmp_path / "t.csv", b"filepath,title\na.jpg,\x81\n"), encoding="cp1252")


def test_a_stated_utf8_may_begin_with_a_mark(tmp_path):
    assert columns(read_table(write(tmp_path / "t.csv", "\ufefffilepath,title\na.jpg,x\n"), encoding="utf-8")) == [
        ("a.jpg", "x")
    ]


@pytest.mark.parametrize("encoding", ["base64", "rot13", "klingon", "a\0b"])
def test_what_encodes_no_text_is_no_encoding(tmp_path, encoding):
    with pytest.raises(ConfigError, match=r"data\.encoding"):
        read_table(write(tmp_path / "t.csv", "filepath,title\na.jpg,x\n"), encoding=encoding)


def test_a_file_without_lines_is_refused_before_it_fills_the_memory(tmp_path):
    with pytest.raises(DataError, match="line 1 is longer than 16 MB"):
        read_table(write(tmp_path / "t.csv", b"x" * (17 << 20)))


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_any_line_end_is_read_in_blocks(tmp_path, end):
    text = end.join(["filepath,title", *(f"{i}.jpg,caption {i}" for i in range(50_000))])
    table = read_table(write(tmp_path / "t.csv", text))
    assert len(table) == 50_000
    assert table.caption(49_999) == "caption 49999"
    assert table.where(49_999).endswith("line 50001")


SCORED = "filepath,title,score\na.jpg,x,0.5\nb.jpg,y,0.1\nc.jpg,z,none\nd.jpg,w,0.9\n"


def test_a_filter_sees_columns_that_are_not_read_otherwise(tmp_path):
    file = write(tmp_path / "t.csv", SCORED)
    table = read_table(file, filter="score > 0.3")
    assert columns(table) == [("a.jpg", "x"), ("d.jpg", "w")]
    assert table.lines.tolist() == [2, 5]
    assert columns(read_table(file, filter="score > 0.3", max_rows=1)) == [("a.jpg", "x")]
    assert columns(read_table(file, filter="score < 0.3 AND title <> 'x'")) == [("b.jpg", "y")]


def test_a_filter_must_name_a_column_and_leave_rows(tmp_path):
    file = write(tmp_path / "t.csv", SCORED)
    with pytest.raises(DataError, match=r"no column 'scor' \(data\.filter\).*Did you mean 'score'"):
        read_table(file, filter="scor > 0.3")
    # In Python, double quotes are text; in SQL, they are a column.
    with pytest.raises(DataError, match=r"no column 'train' \(data\.filter\).*write it in single quotes: 'train'"):
        read_table(file, filter='title == "train"')
    with pytest.raises(DataError, match=r"no column 'Score' \(data\.filter\).*Did you mean 'score'"):
        read_table(file, filter="Score > 0.3")
    with pytest.raises(DataError, match=r"no row matches data\.filter=score > 3"):
        read_table(file, filter="score > 3")
    with pytest.raises(DataError, match="2 columns named 'score'"):
        read_table(write(tmp_path / "t.csv", "filepath,title,score,score\na.jpg,x,1,2\n"), filter="score > 0")


def test_a_file_whose_rows_all_fall_to_the_filter_may_stand_beside_others(tmp_path):
    files = [write(tmp_path / "a.csv", "filepath,title,score\nz.jpg,no,0\n"), write(tmp_path / "b.csv", SCORED)]
    table = read_table(files, filter="score > 0.3")
    assert [part.rows for part in table.parts] == [0, 2]
    assert [table.part(row).path.name for row in range(2)] == ["b.csv", "b.csv"]


def test_a_part_without_rows_may_stand_beside_others(tmp_path, caplog):
    """Spark writes empty parts. A part whose rows are all bad is an error."""
    files = [write(tmp_path / "a.csv", "filepath,title,score\n"), write(tmp_path / "b.csv", SCORED)]
    table = read_table(files)
    assert [part.rows for part in table.parts] == [0, 4]
    assert table.where(0) == f"{files[1]}, line 2"
    assert "a.csv has no rows" in caplog.text
    with pytest.raises(DataError, match=r"a\.csv and the other files: there are no rows"):
        read_table([files[0], write(tmp_path / "c.csv", "filepath,title\n")])
    with pytest.raises(DataError, match=r"c\.csv has no rows \(1 bad rows were skipped\)"):
        read_table([files[1], write(tmp_path / "c.csv", "filepath,title\nx\n")], on_bad_row="skip")


def test_rows_taken_as_they_are_written_are_reported(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        table = read_table(write(tmp_path / "t.csv", 'filepath,title\na.jpg,"Hi" he said\n'))
    assert table.caption(0) == '"Hi" he said'
    assert "1 rows with broken quotes were read literally" in caplog.text
