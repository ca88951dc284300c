"""The members of a tar, found strictly and fast. Nothing is extracted, and no name is a path to anything.

`tarfile` takes a damaged header in the middle for the end of the archive, and needs four times as long.
"""

import logging
import os
import re
from collections.abc import Iterator, Mapping
from typing import BinaryIO, NamedTuple

log = logging.getLogger(__name__)

_BLOCK = 512
_MAX_HEADER_DATA = 1 << 20  # bytes of a long name or of pax records
_CHUNK = 1 << 20
_PLAIN = b"0\x007"  # types of regular files
_PAX_LENGTH = re.compile(rb"(\d{1,9}) ")
_FAULTS = {b"1": "a link", b"2": "a link", b"3": "a device", b"4": "a device", b"6": "a pipe", b"S": "a sparse file"}
_WITHOUT_DATA = b"123456"  # whatever size their headers claim


class Damaged(Exception):
    """The tar breaks off, or is none; the message says where and how."""


class Member(NamedTuple):
    """A member that is no folder."""

    name: str
    offset: int  # of its bytes in the tar
    size: int  # bytes
    fault: str  # what it is, where it is no regular file


class _Header(NamedTuple):
    name: bytes
    size: int
    kind: bytes
    data: int  # where its data starts


def members(file: BinaryIO) -> Iterator[Member]:
    """The members in order: ustar, GNU and pax.

    Args:
        file: of a tar, which is sought in.

    Raises: Damaged.
    """
    end = os.fstat(file.fileno()).st_size
    position, found = 0, False
    overall: dict[str, bytes] = {}
    following: dict[str, bytes] = {}  # what the headers before a member say of it
    while (header := _header(file, position, end)) is not None:
        found = True
        if header.kind in b"xXgLK":
            position = _next_header(header, end)
            _take_up(header, _data(file, header), following, overall)
            continue
        facts = {**overall, **following}
        following = {}
        member = _member(header, facts)
        if member.offset + member.size > end:
            raise Damaged(f"it ends at byte {end}, inside the member {member.name!r}")
        if header.kind != b"5" and not member.name.endswith("/"):
            yield member
        position = member.offset + _padded(member.size)
    if not found:
        raise Damaged("it holds nothing")
    _check_end(file, position)
    if position > end:
        raise Damaged(f"it ends at byte {end}, where its last member has not ended")
    if position == end:
        log.warning("%s has no end mark, as if its writing was cut off.", file.name)


def _check_end(file: BinaryIO, position: int) -> None:
    """An end mark is the end: a header in a hole looks like one, as after a download that left pieces out."""
    file.seek(position)
    while chunk := file.read(_CHUNK):
        if rest := chunk.lstrip(b"\0"):
            more = file.tell() - len(rest)
            raise Damaged(
                f"byte {position} should begin a member, but is empty, and at byte {more} there is more (several tars in one file "
                "are joined with tar -A)"
            )


def _header(file: BinaryIO, position: int, end: int) -> _Header | None:
    """The header at a position; None at the end mark, or at the end of a file that has none."""
    file.seek(position)
    block = file.read(_BLOCK)
    if not block or not any(block):
        return None
    if len(block) < _BLOCK:
        raise Damaged(f"it ends at byte {end}, inside a header")
    try:
        checksum = int(block[148:156].strip(b" \0") or b"0", 8)
    except ValueError:
        checksum = -1
    if checksum != sum(block) - sum(block[148:156]) + 8 * ord(" "):
        raise Damaged(f"byte {position} should begin a member, but does not")
    data = position + _BLOCK
    if block[156:157] == b"S" and block[482]:
        data = _after_sparse_map(file, data)
    return _Header(_name(block), _number(block[124:136], position), block[156:157], data)


def _after_sparse_map(file: BinaryIO, position: int) -> int:
    """Where the data of GNU's sparse file starts, whose map goes on in blocks of its own."""
    while len(block := file.read(_BLOCK)) == _BLOCK:
        position += _BLOCK
        if not block[504]:
            break
    return position


def _name(block: bytes) -> bytes:
    name, prefix = _string(block[:100]), _string(block[345:500])
    return prefix + b"/" + name if prefix and block[257:263] == b"ustar\0" else name


def _number(field: bytes, position: int) -> int:
    """Octal digits, or GNU's bytes of a number that is too large for them."""
    try:
        number = int.from_bytes(field[1:], "big") if field[0] == 0x80 else int(field.strip(b" \0") or b"0", 8)
    except ValueError:
        number = -1
    if not 0 <= number < 1 << 62:
        raise Damaged(f"the member at byte {position} has no size")
    return number


def _string(field: bytes) -> bytes:
    return field.partition(b"\0")[0]


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _next_header(header: _Header, end: int) -> int:
    if header.size > _MAX_HEADER_DATA or header.data + header.size > end:
        raise Damaged(f"the header at byte {header.data - _BLOCK} claims {header.size:,} bytes")
    return header.data + _padded(header.size)


def _data(file: BinaryIO, header: _Header) -> bytes:
    file.seek(header.data)
    return file.read(header.size)


def _take_up(header: _Header, data: bytes, following: dict[str, bytes], overall: dict[str, bytes]) -> None:
    if header.kind == b"L":
        following["path"] = _string(data)
    elif header.kind in b"xX":
        following |= _pax_records(data, header.data)
    elif header.kind == b"g":
        overall |= _pax_records(data, header.data)


def _pax_records(data: bytes, position: int) -> dict[str, bytes]:
    """`<length> <key>=<value>` and a line end, over and over; the length is the whole record's."""
    records: dict[str, bytes] = {}
    start = 0
    while start < len(data):
        match = _PAX_LENGTH.match(data, start)
        end = start + int(match[1]) if match else 0
        if match is None or not match.end() + 2 < end <= len(data):
            raise Damaged(f"the pax header at byte {position - _BLOCK} is broken")
        key, _, value = data[match.end() : end - 1].partition(b"=")
        records[key.decode("utf-8", "replace")] = value
        start = end
    return records


def _member(header: _Header, facts: Mapping[str, bytes]) -> Member:
    fault = "" if header.kind in _PLAIN else _FAULTS.get(header.kind, "no regular file")
    if any(key.startswith("GNU.sparse") for key in facts):
        fault = "a sparse file"
    size = header.size
    if (written := facts.get("size", b"")).isdigit() and len(written) < 20:
        size = int(written)
    name = facts.get("path", header.name).decode("utf-8", "surrogateescape")
    return Member(name, header.data, 0 if header.kind in _WITHOUT_DATA else size, fault)
