import codecs
import json
import time
import tracemalloc

import pytest

from clip_exp.data.tables import jsonl, records
from clip_exp.data.tables.open import read_table
from clip_exp.data.tables.reader import TableOptions
from clip_exp.errors import ConfigError, DataError


def write(file, *lines: object):
    """Write one line per record: bytes and text verbatim, anything else as JSON."""
    texts = [
        line if isinstance(line, bytes) else line.encode() if isinstance(line, str) else json.dumps(line).encode()
        for line in lines
    ]
    file.write_bytes(b"\n".join(texts) + b"\n")
    return file


def captions(table):
    return [table.caption(row) for row in range(len(table))]


GOOD = {"filepath": "a.jpg", "title": "a dog"}


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".JSON"])
def test_captions_are_read_verbatim(tmp_path, suffix):
    written = ["null", "NA", "007", "", " a  dog\t", "line\nbreak", 'a "quote"', "犬 🐕", "e\u0301", "\u2028\x85\x1a"]
    rows = [{"title": caption, "filepath": "x/é.jpg", "more": [1, {"title": 2}]} for caption in written]
    table = read_table(write(tmp_path / f"t{suffix}", *rows))
    assert captions(table) == written
    assert {table.path(row) for row in range(len(table))} == {"x/é.jpg"}


def test_line_ends_blank_lines_a_mark_and_a_missing_last_end_are_fine(tmp_path):
    file = tmp_path / "t.jsonl"
    row = json.dumps(GOOD).encode()
    file.write_bytes(codecs.BOM_UTF8 + row + b"\r\n\n  \r\n" + row)
    table = read_table(file)
    assert captions(table) == ["a dog", "a dog"]
    assert table.where(1) == f"{file}, line 4"


BAD = {
    '{"filepath": "a.jpg", "title": "x"': ("not JSON", "is not JSON"),
    "{'filepath': 'a.jpg', 'title': 'x'}": ("not JSON", "is not JSON"),
    '{"filepath": "a.jpg", "title": "x"} {}': ("not JSON", "Extra data"),
    '"a.jpg"': ("not an object", "is not an object"),
    '{"filepath": "a.jpg", "titel": "x"}': ("no caption", r"has no key 'title' \(data.caption_key\).*Set data.caption_key=titel"),
    '{"title": "x"}': ("no image path", "has no key 'filepath'"),
    '{"filepath": "a.jpg", "title": null}': ("no caption", "'title' is missing or null"),
    '{"filepath": "", "title": "x"}': ("no image path", "is empty"),
    '{"filepath": "a.jpg", "title": 7}': ("the caption is not text", "not text but a number: 7"),
    '{"filepath": "a.jpg", "title": ["x", 7]}': ("the caption is not text", "not text but a number: 7"),
    '{"filepath": "a.jpg", "title": [" ", null]}': ("no caption", "every caption is empty"),
    '{"filepath": ["a.jpg"], "title": "x"}': ("the image path is not text", "not text but a list"),
    '{"filepath": "a.jpg", "title": NaN}': ("the caption is not text", "not text but a number: nan"),
    '{"filepath": "a.jpg", "title": "x", "title": "y"}': ("duplicate key", "'title' appears 2 times"),
    '{"filepath": "a.jpg", "title": "x", "n": {"k": 1, "k": 2}}': ("duplicate key", "'k' appears 2 times"),
    r'{"filepath": "a.jpg", "title": "x\u0000"}': ("NUL character", "contains a NUL character"),
    r'{"filepath": "a.jpg", "title": "\ud800"}': ("not Unicode", "lone surrogate"),
    '{"filepath": "a.jpg", "title": "%s"}' % ("x" * 32_769): ("caption too long", "32,769 characters, more than 32,768"),
    '{"filepath": "a.jpg", "title": "x", "n": %s}' % ("[" * 100_000): ("not JSON", "nested too deeply"),
    '{"filepath": "a.jpg", "title": "x", "n": %s}' % ("1" * 5_000): ("not JSON", "is not JSON"),
    b'{"filepath": "a.jpg", "title": "\xe9t\xe9"}': ("not UTF-8", "byte 32 of the line is not UTF-8"),
    '{"filepath": "a.jpg", "title": "%s"}' % ("x" * (17 << 20)): ("line too long", "more than 16 MB"),
}  # fmt: skip


@pytest.mark.parametrize("line", BAD, ids=[f"{reason} {number}" for number, (reason, _) in enumerate(BAD.values())])
def test_a_bad_row_is_reported_with_its_line_or_left_out_by_reason(tmp_path, line):
    reason, reported = BAD[line]
    file = write(tmp_path / "t.jsonl", GOOD, "", line, GOOD)
    with pytest.raises(DataError, match=rf"t\.jsonl, line 3: .*{reported}.*data\.on_bad_row=skip"):
        read_table(file)
    table = read_table(file, on_bad_row="skip")
    assert captions(table) == ["a dog", "a dog"]
    assert table.lines.tolist() == [1, 4]
    assert (table.parts[0].bad, table.parts[0].bad_examples) == ({reason: 1}, ((3, reason),))


def test_labels_may_be_whole_numbers_and_none(tmp_path):
    file = write(tmp_path / "t.jsonl", *({"filepath": "a.jpg", "label": label} for label in ("cat", 7, None, "")))
    table = read_table(file, caption_key=None, label_key="label")
    assert [table.label(row) for row in range(4)] == ["cat", "7", "", ""]
    with pytest.raises(DataError, match="the label 'label' is not text but a truth value: True"):
        read_table(
            write(tmp_path / "t.jsonl", {"filepath": "a.jpg", "label": True}), caption_key=None, label_key="label"
        )


@pytest.mark.parametrize(
    ("content", "reported"),
    [
        (b"", "is empty"),
        (b"\n\n", "no rows"),
        *(
            ('{"filepath": "a.jpg"}'.encode(encoding), "UTF-16 or UTF-32, but JSON Lines must be UTF-8")
            for encoding in ("utf-16", "utf-16-be", "utf-32", "utf-32-le")
        ),
    ],
)
def test_files_of_another_kind_are_refused(tmp_path, content, reported):
    (tmp_path / "t.json").write_bytes(content)
    with pytest.raises(DataError, match=reported):
        read_table(tmp_path / "t.json")


def test_a_filter_sees_the_types_of_json_and_asks_for_keys_that_are_there(tmp_path):
    widths = [300, 255.5, "400", None, [500], True, 10**30, float("nan")]
    rows = [{"filepath": f"{i}.jpg", "title": "x", "width": width} for i, width in enumerate(widths)]
    file = write(tmp_path / "t.jsonl", *rows, {"filepath": "no.jpg", "title": "x"})
    table = read_table(file, filter="width >= 256")
    assert [table.path(row) for row in range(len(table))] == ["0.jpg", "2.jpg", "6.jpg"]
    assert table.lines.tolist() == [1, 3, 7]
    with pytest.raises(DataError, match=r"has no column 'widht' \(data.filter\).*Did you mean 'width'"):
        read_table(file, filter="widht > 3")
    with pytest.raises(DataError, match="no row matches"):
        read_table(file, filter="width > 1e40")


def test_a_file_that_cannot_be_opened_is_a_configuration_error(tmp_path, monkeypatch):
    file = write(tmp_path / "t.jsonl", GOOD)

    def refuse(*_args: object, **_keywords: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(ConfigError, match="cannot be read: Permission denied"):
        read_table(file)


def test_reading_takes_a_few_times_as_long_as_parsing(tmp_path):
    """A factor of about 2.5. The limit is far above it, and below what any quadratic step would take."""
    rows = [
        json.dumps({"filepath": f"img/{i:07d}.jpg", "title": f"a caption of a usual length, number {i}"})
        for i in range(200_000)
    ]
    file = tmp_path / "t.jsonl"
    file.write_text("\n".join(rows))
    started_s = time.process_time()
    for row in rows:
        json.loads(row)
    parsed_s = time.process_time()
    assert len(read_table(file)) == 200_000
    assert time.process_time() - parsed_s < 20 * (parsed_s - started_s)


def test_what_nobody_asks_for_takes_no_memory(tmp_path):
    """Each record has an embedding, and a filter uses another key."""
    rows = [{**GOOD, "width": i, "embedding": list(range(1_000, 6_000))} for i in range(200)]
    file = write(tmp_path / "t.jsonl", *rows)
    tracemalloc.start()
    try:
        assert len(read_table(file, filter="width >= 100")) == 100
        assert tracemalloc.get_traced_memory()[1] < 10 << 20
    finally:
        tracemalloc.stop()


def test_long_values_of_a_filter_come_in_smaller_blocks(tmp_path, monkeypatch):
    file = write(tmp_path / "t.jsonl", *({**GOOD, "text": "x" * 1_000} for _ in range(20)))
    monkeypatch.setattr(records, "_BLOCK_BYTES", 5_000)
    reader = jsonl.JsonLinesReader(file, TableOptions(filter="len(text) > 3"))
    assert [len(block) for block in reader.blocks()] == [5, 5, 5, 5]
    assert reader.bytes_read == file.stat().st_size
