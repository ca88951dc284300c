"""Damaged tables from a seed, all different, each named after its damage.

A table has good or unusual rows, is written in one of the formats, and is damaged up to three times: in its rows, text, bytes, or
as a file.
"""

import csv
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tests.data.damaged_bytes import BYTE_DAMAGE, NO_JPEG, TEXT_DAMAGE

Rows = list[list[str]]
CAPTIONS = (
    "a dog", "null", "NA", "007", "", " ", "two cats, on a mat", 'he said "hi"', 'an "unclosed quote', "line one\nline two",
    "café à Zürich", "一只猫坐在垫子上", "👩‍👩‍👧‍👦 family", "a\u2028b\u0085c", "a\tb", "a;b|c", "\x1a", "=1+1", "'", "\\", "a\rb", "\ufeff",
    "x" * 500, "nan", "None", "مرحبا", "-1e308", "{}", "&lt;b&gt;",
)  # fmt: skip


def damaged_tables(folder: Path, count: int, seed: int) -> list[Path]:
    """Write `count` tables to `folder`, next to the image `a.png` that some of their rows name."""
    Image.new("RGB", (8, 8), "red").save(folder / "a.png")
    return [damaged_table(folder, number, Random(f"{seed} {number}")) for number in range(count)]


def damaged_table(folder: Path, number: int, draw: Random) -> Path:
    """Write the table with this number. It depends only on `draw`."""
    suffix = draw.choice(["csv", "csv", "tsv", "jsonl", "parquet", "tar"])
    rows = sound_rows(draw)
    done: list[str] = []
    for _ in range(draw.choice([0, 1, 1, 2])):
        rows = apply(ROW_DAMAGE, draw, rows, done)
    data = WRITERS[suffix](draw, rows)
    if suffix in ("csv", "tsv", "jsonl"):
        for _ in range(draw.choice([0, 0, 1, 2])):
            data = apply(TEXT_DAMAGE, draw, data, done)
    for _ in range(draw.choice([0, 0, 1, 2])):
        data = apply(BYTE_DAMAGE, draw, data, done)
    name = suffix if draw.random() < 0.95 else draw.choice(["csv", "jsonl", "parquet", "tar", "txt", "json", "gz"])
    done += [f"as {name}"] * (name != suffix)
    path = folder / f"{number:04d} {suffix} {', '.join(done) or 'sound'}.{name}"
    write(path, data, draw)
    return path


def apply(damages: list[Callable], draw: Random, value, done: list[str]):
    damage = draw.choice(damages)
    done.append(damage.__name__.replace("_", " "))
    return damage(value, draw)


def sound_rows(draw: Random) -> Rows:
    image = ("a.png", "missing.png", "folder/b.jpg")
    rows = [[draw.choice(image), draw.choice(CAPTIONS)] for _ in range(draw.choice([1, 3, 20, 60]))]
    return [["filepath", "title"], *rows]


# Rows


def another_column(rows: Rows, draw: Random) -> Rows:
    place = draw.randrange(3)
    return [[*row[:place], draw.choice(["1", "0.5", "x", ""]), *row[place:]] for row in rows]


def a_column_twice(rows: Rows, draw: Random) -> Rows:
    column = draw.randrange(len(rows[0])) if rows and rows[0] else 0
    return [[*row, *row[column : column + 1]] for row in rows]


def a_column_fewer(rows: Rows, draw: Random) -> Rows:
    return [row[:-1] for row in rows]


def ragged(rows: Rows, draw: Random) -> Rows:
    return [row + draw.choice([[], [], ["more"], ["more"] * 40]) if draw.random() < 0.5 else row[:1] for row in rows]


def no_header(rows: Rows, draw: Random) -> Rows:
    return rows[1:]


def header_only(rows: Rows, draw: Random) -> Rows:
    return rows[:1]


def header_again(rows: Rows, draw: Random) -> Rows:
    return rows + rows


def other_names(rows: Rows, draw: Random) -> Rows:
    name = draw.choice(["Filepath", " filepath", "url", "filepath\n", "", "图片", "title"])
    return [[name, *row[1:]] if i == 0 else row for i, row in enumerate(rows)]


def huge_field(rows: Rows, draw: Random) -> Rows:
    text = draw.choice(["word ", "é", '"', "\n", ",", "1"])
    return [*rows, ["a.png", text * draw.choice([7_000, 40_000, 140_000])]]


def nul_in_a_field(rows: Rows, draw: Random) -> Rows:
    return [[field + "\0" if draw.random() < 0.1 else field for field in row] for row in rows]


def strange_paths(rows: Rows, draw: Random) -> Rows:
    paths = [
        "",
        "/etc/passwd",
        "../../a.png",
        ".",
        "/dev/zero",
        "a.png\0",
        "x" * 5000,
        "a\nb.png",
        "http://x/a.png",
        "~/a.png",
    ]
    return [[draw.choice(paths), *row[1:]] if draw.random() < 0.3 and i else row for i, row in enumerate(rows)]


def half_surrogates(rows: Rows, draw: Random) -> Rows:
    return [*rows, ["a.png", "half a pair \ud83d"]]


ROW_DAMAGE = [
    another_column, a_column_twice, a_column_fewer, ragged, no_header, header_only, header_again, other_names, huge_field,
    nul_in_a_field, strange_paths, half_surrogates,
]  # fmt: skip


# Formats


def as_csv(draw: Random, rows: Rows, separator: str | None = None) -> bytes:
    text = io.StringIO()
    writer = csv.writer(
        text,
        delimiter=separator or draw.choice([",", ",", ";", "|", ":"]),
        lineterminator=draw.choice(["\n", "\r\n"]),
        quoting=draw.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    )
    writer.writerows(rows)
    return text.getvalue().encode("utf-8", "surrogatepass")


def as_tsv(draw: Random, rows: Rows) -> bytes:
    return as_csv(draw, rows, "\t")


def as_jsonl(draw: Random, rows: Rows) -> bytes:
    names = rows[0] if rows else []
    values = [None, 7, 1.5, True, ["a"], {"a": 1}, float("nan"), 10**400]
    lines = []
    for row in rows[1:]:
        record = dict(zip(names, row, strict=False))
        if draw.random() < 0.1:
            record[draw.choice(["title", "filepath", "more"])] = draw.choice(values)
        lines.append(json.dumps(record, ensure_ascii=draw.random() < 0.5))
    return "\n".join([*lines, ""]).encode("utf-8", "surrogatepass")


def as_parquet(draw: Random, rows: Rows) -> bytes:
    names, width = (rows[0], len(rows[0])) if rows else ([], 0)
    columns = [[row[i] if i < len(row) else None for row in rows[1:]] for i in range(width)]
    kinds = [pa.string(), pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())]
    arrays = []
    for column in columns:
        values = [None if value is None else value.encode("utf-8", "surrogatepass") for value in column]
        binary = pa.array(values, pa.binary())
        kind = draw.choice(kinds)
        arrays.append(binary if pa.types.is_binary(kind) else binary.cast(pa.string(), safe=False).cast(kind))
    stream = io.BytesIO()
    table = pa.Table.from_arrays(arrays, names=[name.encode("utf-8", "replace").decode() for name in names])
    compression = draw.choice(["snappy", "zstd", "gzip", "none"])
    pq.write_table(table, stream, compression=compression, row_group_size=draw.choice([None, 5]))
    return stream.getvalue()


def as_tar(draw: Random, rows: Rows) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=draw.choice([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])) as tar:
        for i, row in enumerate(rows[1:]):
            members = {"jpg": NO_JPEG, "txt": "".join(row[1:2]).encode("utf-8", "surrogatepass"), "json": b'{"a": 1}'}
            for suffix in draw.sample(sorted(members), draw.choice([1, 2, 3, 3, 3])):
                member = tarfile.TarInfo(draw.choice(["", "", "", "folder/", "../", "/"]) + f"{i:03d}.{suffix}")
                member.size = len(members[suffix])
                if draw.random() < 0.05:
                    member.type = draw.choice([tarfile.SYMTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
                    member.size, member.linkname = 0, "/etc/passwd"
                tar.addfile(member, io.BytesIO(members[suffix]))
    return stream.getvalue()


WRITERS: dict[str, Callable[[Random, Rows], bytes]] = {
    "csv": as_csv, "tsv": as_tsv, "jsonl": as_jsonl, "parquet": as_parquet, "tar": as_tar,
}  # fmt: skip


def write(path: Path, data: bytes, draw: Random) -> None:
    """Write, in one of a hundred cases, something that is not a file."""
    kind = draw.choice(["folder", "dangling link", "pipe", "link"]) if draw.random() < 0.01 else "file"
    if kind == "folder":
        path.mkdir()
    elif kind == "dangling link":
        path.symlink_to(path.parent / "nowhere")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to("/dev/zero")
    else:
        path.write_bytes(data)
