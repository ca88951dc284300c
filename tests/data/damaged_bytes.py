"""Damage to the text and the bytes of a file, each as a function of the content and of random draws."""

import gzip
from random import Random

ENCODINGS = (
    "utf-16",
    "utf-16-le",
    "utf-16-be",
    "utf-32",
    "latin-1",
    "cp1252",
    "gb18030",
    "shift_jis",
    "cp1251",
    "utf-7",
)
NO_JPEG = b"\xff\xd8\xff\xe0\x00\x10JFIF" + bytes(range(256)) * 4  # starts like a JPEG
PAGES = (
    b"<!DOCTYPE html><html><body>404 not found</body></html>\n",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n",
    NO_JPEG,
    b"PK\x03\x04" + bytes(200),
    b"\x80\x04\x95\x00\x00\x00.",
    b"{" * 5000,
    b"[" * 100_000,
    b'"' * 3001,
    b"," * 5000 + b"\n" * 50,
    b"\n" * 1000,
    b"\x00" * 4096,
    b"PAR1" + bytes(50) + b"PAR1",
)


# Text


def other_encoding(data: bytes, draw: Random) -> bytes:
    return data.decode("utf-8", "replace").encode(draw.choice(ENCODINGS), "replace")


def byte_order_mark(data: bytes, draw: Random) -> bytes:
    return (
        draw.choice([b"\xef\xbb\xbf", b"\xef\xbb\xbf\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff", b"\xff\xfe\x00\x00"])
        + data
    )


def cr_only(data: bytes, draw: Random) -> bytes:
    return data.replace(b"\r\n", b"\n").replace(b"\n", b"\r")


def mixed_line_ends(data: bytes, draw: Random) -> bytes:
    lines = data.replace(b"\r\n", b"\n").split(b"\n")
    return b"".join(line + draw.choice([b"\n", b"\r\n", b"\r", b"\n\r", b"\n\n", b"\x0b", b"\x85"]) for line in lines)


def no_last_line_end(data: bytes, draw: Random) -> bytes:
    return data.rstrip(b"\r\n")


def a_quote_somewhere(data: bytes, draw: Random) -> bytes:
    return inserted(data, draw.choice([b'"', b'""', b'"""', b',"', b'",', b'\n"']), draw)


def a_separator_somewhere(data: bytes, draw: Random) -> bytes:
    return inserted(data, draw.choice([b",", b"\t", b";", b"|", b":"]), draw)


def two_separators(data: bytes, draw: Random) -> bytes:
    half = len(data) // 2
    return data[:half] + data[half:].replace(b",", b";").replace(b"\t", b",")


def latin_1_here_and_there(data: bytes, draw: Random) -> bytes:
    return inserted(inserted(data, b"caf\xe9", draw), b"\xff", draw)


def spaces_around(data: bytes, draw: Random) -> bytes:
    return data.replace(b",", b" , ").replace(b"\n", b" \n ")


def comments_first(data: bytes, draw: Random) -> bytes:
    return draw.choice([b"# made by hand\n", b"sep=;\r\n", b"\n\n\n", b" \n", b",\n"]) + data


def unquoted(data: bytes, draw: Random) -> bytes:
    return data.replace(b'"', b"")


TEXT_DAMAGE = [
    other_encoding, byte_order_mark, cr_only, mixed_line_ends, no_last_line_end, a_quote_somewhere, a_separator_somewhere,
    two_separators, latin_1_here_and_there, spaces_around, comments_first, unquoted,
]  # fmt: skip


# Bytes


def inserted(data: bytes, piece: bytes, draw: Random) -> bytes:
    place = draw.randrange(len(data) + 1)
    return data[:place] + piece + data[place:]


def cut_short(data: bytes, draw: Random) -> bytes:
    return data[: draw.choice([draw.randrange(len(data) + 1), max(0, len(data) - draw.randrange(1, 600))])]


def start_missing(data: bytes, draw: Random) -> bytes:
    return data[draw.randrange(len(data) + 1) :]


def flipped_bits(data: bytes, draw: Random) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.choice([1, 4, 40]) if data else 0):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def zeros_inside(data: bytes, draw: Random) -> bytes:
    place, size = draw.randrange(len(data) + 1), draw.choice([1, 100, 4096])
    return data[:place] + bytes(min(size, len(data) - place)) + data[place + size :]


def rubbish_inside(data: bytes, draw: Random) -> bytes:
    return inserted(data, draw.randbytes(draw.choice([1, 20, 2000])), draw)


def a_piece_twice(data: bytes, draw: Random) -> bytes:
    start, end = sorted(draw.randrange(len(data) + 1) for _ in range(2))
    return data[:end] + data[start:]


def twice(data: bytes, draw: Random) -> bytes:
    return data + data


def compressed(data: bytes, draw: Random) -> bytes:
    return gzip.compress(data, mtime=0)


def another_file(data: bytes, draw: Random) -> bytes:
    return draw.choice(PAGES)


def only_rubbish(data: bytes, draw: Random) -> bytes:
    return draw.randbytes(draw.choice([1, 300, 5000]))


def empty(data: bytes, draw: Random) -> bytes:
    return b""


BYTE_DAMAGE = [
    cut_short, cut_short, start_missing, flipped_bits, flipped_bits, zeros_inside, rubbish_inside, a_piece_twice, twice,
    compressed, another_file, only_rubbish, empty,
]  # fmt: skip
