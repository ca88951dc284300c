import json
import os
import subprocess
import tarfile

import pytest

from clip_exp.data.files import BadImage, ImageLimits
from clip_exp.data.tables import records, shards
from clip_exp.data.tables.open import read_table
from clip_exp.data.tables.reader import TableOptions
from clip_exp.data.tables.tar import members
from clip_exp.errors import DataError
from tests.data.tables.shard_files import jpeg, write_shard

LIMITS = ImageLimits()
SAMPLE = {"1.jpg": b"image 1", "1.txt": "a dog"}


def rows(table):
    return [(table.path(row), table.caption(row), bytes(table.read_image(row, LIMITS))) for row in range(len(table))]


def read(tmp_path, contents, **options):
    return read_table(write_shard(tmp_path / "s.tar", contents), **options)


def test_a_real_shard_has_the_samples_that_tarfile_finds(real_data):
    file = real_data / "webdataset" / "cc12m-train-0000.tar"
    with tarfile.open(file) as tar:
        found = {member.name: tar.extractfile(member).read() for member in tar}
    keys = dict.fromkeys(name.partition(".")[0] for name in found)
    expected = [(f"{key}.jpg", found[f"{key}.txt"].decode(), found[f"{key}.jpg"]) for key in keys]
    table = read_table(file)
    assert (rows(table), len(table)) == (expected, 32)
    assert table.where(31) == f"{file}, sample 32"
    assert table.image_path(0) == f"{file}/{table.path(0)}"
    by_json = read_table(file, caption_key="caption")
    assert [by_json.caption(row) for row in range(32)] == [table.caption(row) for row in range(32)]
    wide = read_table(file, filter="original_width > 1000 AND caption LIKE '%a%'")
    assert 0 < len(wide) < 32
    assert rows(wide)[0] in rows(table)


def test_the_image_is_the_first_kind_that_a_sample_has_and_names_are_webdatasets(tmp_path):
    contents = {
        "README": "no sample", ".hidden.jpg": b"", "dir/": tarfile.TarInfo(), "dir/.x.txt": "no",
        "./a/1.PNG": b"png", "./a/1.seg.jpg": b"mask", "./a/1.JPG": b"jpg", "./a/1.TXT": "upper case",
        "b.c/2.jpeg": b"jpeg", "b.c/2.webp": b"webp", "b.c/2.txt": " verbatim\n",
        "b.c/3.gif": b"gif", "b.c/3.txt": b"\xef\xbb\xbfmarked", "4.bmp": b"bmp", "4.txt": "",
    }  # fmt: skip
    contents["dir/"].type = tarfile.DIRTYPE
    assert rows(read(tmp_path, contents)) == [
        ("./a/1.JPG", "upper case", b"jpg"),
        ("b.c/2.jpeg", " verbatim\n", b"jpeg"),
        ("b.c/3.gif", "marked", b"gif"),
        ("4.bmp", "", b"bmp"),
    ]
    masks = read(tmp_path, contents, image_key="seg.jpg")
    assert rows(masks)[0] == ("./a/1.seg.jpg", "upper case", b"mask")


def test_captions_come_from_a_member_from_the_json_or_from_the_txt(tmp_path):
    contents = {
        "1.jpg": b"1", "1.title": "member", "1.json": {"title": "json"}, "1.txt": "txt",
        "2.jpg": b"2", "2.json": {"title": "json"}, "2.txt": "txt",
        "3.jpg": b"3", "3.json": {"title": None}, "3.txt": "txt",
        "4.jpg": b"4", "4.txt": "txt",
    }  # fmt: skip
    table = read(tmp_path, contents)
    assert [table.caption(row) for row in range(4)] == ["member", "json", "txt", "txt"]


def test_labels_come_from_a_member_or_from_the_json(tmp_path):
    contents = {
        "1.jpg": b"1",
        "1.cls": "3\n",
        "2.jpg": b"2",
        "2.json": {"cls": 7},
        "3.jpg": b"3",
        "3.json": {"cls": None},
    }
    table = read(tmp_path, contents, caption_key=None, label_key="cls")
    assert [table.label(row) for row in range(3)] == ["3", "7", ""]


def odd(kind: bytes, linkname: str = "") -> tarfile.TarInfo:
    header = tarfile.TarInfo()
    header.type, header.linkname = kind, linkname
    return header


BAD = [
    ({"b.txt": "x"}, "no image", "no image among the members txt"),
    ({"b.jpg": b"x"}, "no caption", r"no member \.title; check data.caption_key"),
    ({"b.jpg": b"x", "b.json": {"text": "x"}}, "no caption", "its .json has only 'text'"),
    ({"b.jpg": b"x", "b.json": {"title": None}}, "no caption", "missing or null"),
    ({"b.jpg": b"x", "b.json": {"title": 7}}, "the caption is not text", "a number: 7"),
    ({"b.jpg": b"x", "b.json": "[1]"}, "not an object", "is not an object"),
    ({"b.jpg": b"x", "b.json": "{", "b.txt": "x"}, "not JSON", "is not JSON"),
    ({"b.jpg": b"x", "b.json": '{"n": "' + "x" * (1 << 20) + '"}'}, "JSON too long", "more than 1,048,576"),
    ({"b.jpg": b"x", "b.txt": b"\xe9t\xe9"}, "not UTF-8", "'b.txt' is not UTF-8"),
    ({"b.jpg": b"x", "b.txt": "x\0"}, "NUL character", "NUL"),
    ({"b.jpg": b"x", "b.txt": "x" * 40_000}, "caption too long", "40,000 characters"),
    ({"b.jpg": b"x", "b.txt": "x" * 200_000}, "caption too long", "200,000 bytes"),
    ([("b.jpg", b"x"), ("b.txt", "x"), ("b.txt", "x")], "duplicate key", "must be adjacent"),
    ({"1.jpg": b"x", "1.txt": "x"}, "duplicate key", "must be adjacent"),
    ({"../b.jpg": b"x", "../b.txt": "x"}, "unsafe name", "absolute or contains '..'"),
    ({"a/../../b.jpg": b"x", "a/../../b.txt": "x"}, "unsafe name", "absolute or contains '..'"),
    ({"/etc/b.jpg": b"x", "/etc/b.txt": "x"}, "unsafe name", "absolute or contains '..'"),
    ({"b.jpg": odd(tarfile.SYMTYPE, "/etc/passwd"), "b.txt": "x"}, "not a regular file", "'b.jpg' is a link"),
    ({"b.jpg": odd(tarfile.LNKTYPE, "1.jpg"), "b.txt": "x"}, "not a regular file", "'b.jpg' is a link"),
    ({"b.jpg": b"x", "b.txt": odd(tarfile.FIFOTYPE)}, "not a regular file", "'b.txt' is a pipe"),
    ({"b.jpg": odd(tarfile.CHRTYPE), "b.txt": "x"}, "not a regular file", "'b.jpg' is a device"),
    ({"b.jpg": odd(tarfile.GNUTYPE_SPARSE), "b.txt": "x"}, "not a regular file", "'b.jpg' is a sparse file"),
    ({"b\udce9.jpg": b"x", "b\udce9.txt": "x"}, "not UTF-8", "its name is not UTF-8"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("sample", "reason", "reported"), BAD, ids=[f"{bad[1]} {number}" for number, bad in enumerate(BAD)]
)
def test_a_bad_sample_is_reported_with_its_number_or_left_out_by_reason(tmp_path, sample, reason, reported):
    first, last = list(SAMPLE.items()), [("3.jpg", b"image 3"), ("3.txt", "a cat")]
    contents = [*first, *(sample.items() if isinstance(sample, dict) else sample), *last]
    if "1.jpg" in sample:
        contents[2:2] = [("2.jpg", b"image 2"), ("2.txt", "x")]
    file = write_shard(tmp_path / "s.tar", contents, tarfile.GNU_FORMAT)
    with pytest.raises(DataError, match=rf"s\.tar, sample [23]: .*{reported}.*\(sample '.*'\).*data\.on_bad_row=skip"):
        read_table(file)
    table = read_table(file, on_bad_row="skip")
    assert rows(table)[0] == ("1.jpg", "a dog", b"image 1")
    assert rows(table)[-1] == ("3.jpg", "a cat", b"image 3")
    assert table.parts[0].bad == {reason: 1}


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_that_tarfile_finds(tmp_path, format):
    names = ["1.jpg", "f/" * 60 + "2.jpg", "x" * 97 + ".b", "é犬.txt"]
    if format != tarfile.USTAR_FORMAT:
        names += ["n" * 300 + ".jpg", "g/" * 200 + "é.json"]
    contents = {name: os.urandom(size) for name, size in zip(names, (0, 1, 511, 512, 513, 70_000), strict=False)}
    file = write_shard(tmp_path / "s.tar", contents, format)
    with tarfile.open(file) as tar, open(file, "rb") as stream:
        assert [member[:3] for member in members(stream)] == [(each.name, each.offset_data, each.size) for each in tar]


def test_shards_made_by_the_tar_command_read_the_same(tmp_path):
    names = ["1.jpg", "1.txt", f"{'a' * 90}/{'b' * 90}.jpg", f"{'a' * 90}/{'b' * 90}.txt"]
    (tmp_path / names[2]).parent.mkdir()
    for name in names:
        (tmp_path / name).write_text(name)
    for format in ("ustar", "gnu", "posix", "v7"):
        given = names[:2] if format == "v7" else names
        subprocess.run(["tar", f"--format={format}", "-cf", "s.tar", *given], cwd=tmp_path, check=True)
        found = [(name, name[:-3] + "txt", name.encode()) for name in given[::2]]
        assert rows(read_table(tmp_path / "s.tar")) == found


def whole_shard(file, samples: int = 6) -> bytes:
    contents = {
        f"{i}.{kind}": f"{kind} {i} ".encode() * (300 * i) for i in range(1, samples + 1) for kind in ("jpg", "txt")
    }
    return write_shard(file, contents).read_bytes()


def test_a_shard_that_is_cut_off_gives_the_samples_before_the_cut_and_says_so(tmp_path):
    file = tmp_path / "s.tar"
    whole = whole_shard(file)
    before = rows(read_table(file))
    end = max(offset + size for offset, size in read_table(file).members.tolist())
    messages = []
    for cut in range(1_301, end, 2 * 587):  # odd, because a cut at the end of a member cannot be detected
        file.write_bytes(whole[:cut])
        try:
            table = read_table(file, on_bad_row="skip")
        except DataError as error:
            messages.append(str(error))
            continue
        assert rows(table) == before[: len(table)]
        assert table.parts[0].bad == {"damaged shard": 1}
        with pytest.raises(DataError, match=r"is damaged here: it ends at byte \d+, "):
            read_table(file)
    assert all("is not a readable tar" in message or "has no rows (1 bad" in message for message in messages)


def test_a_damaged_header_is_reported_where_tarfile_takes_it_for_the_end(tmp_path):
    file = tmp_path / "s.tar"
    whole = bytearray(whole_shard(file))
    offset = int(read_table(file).members[3][0]) - 512
    whole[offset + 10] ^= 0xFF
    file.write_bytes(whole)
    with tarfile.open(file) as tar:
        assert len(tar.getmembers()) == 6
    with pytest.raises(
        DataError, match=rf"sample 3: the shard is damaged here: there is no valid header at byte {offset}"
    ):
        read_table(file)
    assert len(read_table(file, on_bad_row="skip")) == 2


@pytest.mark.parametrize(
    "field", [(124, b"99999999999\0"), (124, b"\xff" * 12), (124, b"77777777777\0"), (156, b"x"), (156, b"L")]
)
def test_headers_that_claim_too_much_take_no_memory(tmp_path, field):
    header = bytearray(tarfile.TarInfo("1.jpg").tobuf())
    position, value = field
    header[position : position + len(value)] = value
    header[124:136] = header[124:136] if position == 124 else b"77777777777\0"
    header[148:156] = b"%06o\0 " % (sum(header) - sum(header[148:156]) + 256)
    (tmp_path / "s.tar").write_bytes(bytes(header) + bytes(1024))
    with pytest.raises(DataError, match="is not a readable tar"):
        read_table(tmp_path / "s.tar")


def test_a_hole_that_looks_like_the_end_is_reported_and_so_are_joined_tars(tmp_path):
    """A hole as left by an incomplete download. `tarfile` and `tar` stop there silently."""
    file = tmp_path / "s.tar"
    whole = whole_shard(file)
    hole = int(read_table(file).members[3][0]) - 512
    for damaged, samples, reported in (
        (whole[:hole] + bytes(512) + whole[hole + 512 :], 3, hole),
        (whole + whole_shard(file, 2), 6, len(whole.rstrip(b"\0")) // 512 * 512 + 512),
    ):
        file.write_bytes(damaged)
        with pytest.raises(
            DataError,
            match=rf"sample {samples}: the shard is damaged here: there is no member at byte {reported}, but more .*tar -A",
        ):
            read_table(file)
        table = read_table(file, on_bad_row="skip")
        assert (len(table), table.parts[0].bad) == (samples - 1, {"damaged shard": 1})


def test_long_lists_of_a_filter_come_in_smaller_blocks(tmp_path, monkeypatch):
    contents = {}
    for i in range(6):
        contents |= {f"{i}.jpg": b"x" * 2_000, f"{i}.txt": "x", f"{i}.json": {"boxes": [1, 2], "more": "x"}}
    file = write_shard(tmp_path / "s.tar", contents)
    monkeypatch.setattr(records, "_BLOCK_BYTES", 100)
    blocks = list(shards.ShardReader(file, TableOptions(filter="len(boxes) > 1")).blocks())
    assert [len(block) for block in blocks] == [4, 2]
    assert all(set(block.extra) == {"boxes"} for block in blocks)


def test_broken_pax_records_are_reported(tmp_path):
    for written in (b"x", b"99 path=a\n", b"3 =\n", b"0 path=a\n", b"5 a=\n" * 1_000 + b"-1 path=a\n", b"1" * 5_000):
        header = tarfile.TarInfo("pax")
        header.type, header.size = tarfile.XHDTYPE, len(written)
        data = header.tobuf() + written + bytes(-len(written) % 512)
        (tmp_path / "s.tar").write_bytes(data + whole_shard(tmp_path / "s.tar"))
        with pytest.raises(DataError, match=r"the pax header at byte 0 is broken"):
            read_table(tmp_path / "s.tar")


def test_other_files_are_no_shards(tmp_path):
    for content in (b"", bytes(1024), b"x" * 5_000, json.dumps({"a": 1}).encode()):
        (tmp_path / "s.tar").write_bytes(content)
        with pytest.raises(DataError, match="is not a readable tar"):
            read_table(tmp_path / "s.tar")


def test_a_shard_without_an_end_mark_is_read_with_a_warning(tmp_path, caplog):
    file = write_shard(tmp_path / "s.tar", SAMPLE)
    file.write_bytes(file.read_bytes()[: 4 * 512])
    assert len(read_table(file)) == 1
    assert "s.tar has no end-of-archive marker" in caplog.text


def test_equal_names_in_two_shards_are_two_images(tmp_path):
    files = [write_shard(tmp_path / f"{i}.tar", {"1.jpg": jpeg(i), "1.txt": f"{i}"}) for i in range(2)]
    table = read_table(files)
    assert table.image_index().tolist() == [0, 1]
    assert [row[1:] for row in rows(table)] == [("0", jpeg(0)), ("1", jpeg(1))]


def test_a_filter_sees_the_json_the_members_and_the_caption(tmp_path):
    contents = {}
    for i, width in enumerate((100, 300, None, "400", 500)):
        record = {} if i == 4 else {"width": width}
        contents |= {f"{i}.jpg": b"x", f"{i}.json": record, f"{i}.txt": f"dog {i}"}
    assert [row[0] for row in rows(read(tmp_path, contents, filter="width >= 256"))] == ["1.jpg", "3.jpg"]
    assert len(read(tmp_path, contents, filter="title LIKE '%dog%' AND title NOT LIKE '%3%'")) == 4
    assert len(read(tmp_path, contents, filter="contains(txt, '3')", caption_key=None)) == 1
    with pytest.raises(DataError, match=r"no column 'widht' \(data.filter\).*'width'.*Did you mean 'width'"):
        read(tmp_path, contents, filter="widht >= 256")


def test_a_shard_that_vanishes_or_shrinks_makes_bad_images(tmp_path):
    table = read(tmp_path, SAMPLE)
    os.truncate(tmp_path / "s.tar", 515)
    with pytest.raises(BadImage):
        table.read_image(0, LIMITS)
    (tmp_path / "s.tar").unlink()
    with pytest.raises(BadImage):
        table.read_image(0, LIMITS)
