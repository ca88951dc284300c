"""Members of a tar, with the positions of their bytes.

`tarfile` is not used, because it takes a damaged header for the end of the archive and is four times slower.
"""

import logging
import os
import re
from collections.abc import Iterator
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
    """Error raised for a tar that is truncated, damaged or of another format.

    The message has the position and the cause.
    """


class Member(NamedTuple):
    """Member of a tar that is not a folder."""

    name: str
    offset: int  # position of its bytes in the tar
    size: int  # bytes
    fault: str  # kind of a member that is not a regular file; empty for a regular file


class _Header(NamedTuple):
    name: bytes
    size: int
    kind: bytes
    data: int  # position of the data


def members(file: BinaryIO) -> Iterator[Member]:
    """Yield the members of a tar in order. Supports the formats ustar, GNU and pax.

    Args:
        file: seekable tar file.

    Raises: Damaged.
    """
    end = os.fstat(file.fileno()).st_size
    position, found = 0, False
    overall: dict[str, bytes] = {}
    following: dict[str, bytes] = {}  # attributes of the next member, from extended headers
    while (header := _header(file, position, end)) is not None:
        found = True
        if header.kind in b"xXgLK":
            if header.size > _MAX_HEADER_DATA or header.data + header.size > end:
                raise Damaged(f"the header at byte {position} claims {header.size:,} bytes")
            file.seek(header.data)
            data = file.read(header.size)
            if header.kind == b"L":
                following["path"] = _string(data)
            elif header.kind in b"xX":
                following |= _pax_records(data, position)
            elif header.kind == b"g":
                overall |= _pax_records(data, position)
            position = header.data + _padded(header.size)
            continue
        facts = {**overall, **following}
        following = {}
        fault = "" if header.kind in _PLAIN else _FAULTS.get(header.kind, "not a regular file")
        if any(key.startswith("GNU.sparse") for key in facts):
            fault = "a sparse file"
        written = facts.get("size", b"")
        size = int(written) if written.isdigit() and len(written) < 20 else header.size
        size = 0 if header.kind in _WITHOUT_DATA else size
        name = facts.get("path", header.name).decode("utf-8", "surrogateescape")
        if header.data + size > end:
            raise Damaged(f"it ends at byte {end}, inside the member {name!r}")
        if header.kind != b"5" and not name.endswith("/"):
            yield Member(name, header.data, size, fault)
        position = header.data + _padded(size)
    if not found:
        raise Damaged("it has no members")
    _check_end(file, position)
    if position > end:
        raise Damaged(f"it ends at byte {end}, before the end of its last member")
    if position == end:
        log.warning("%s has no end-of-archive marker; it may be truncated.", file.name)


def _check_end(file: BinaryIO, position: int) -> None:
    """Check that only zeros follow the end-of-archive marker.

    A hole, as in an incomplete download, looks like a marker.
    """
    file.seek(position)
    while chunk := file.read(_CHUNK):
        if rest := chunk.lstrip(b"\0"):
            more = file.tell() - len(rest)
            raise Damaged(
                f"there is no member at byte {position}, but more data at byte {more} (to join several tars, use tar -A)"
            )


def _header(file: BinaryIO, position: int, end: int) -> _Header | None:
    """Return the header at a position; None at the end-of-archive marker or at the end of the file."""
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
        raise Damaged(f"there is no valid header at byte {position}")
    data = position + _BLOCK
    if block[156:157] == b"S" and block[482]:  # GNU sparse file, whose map continues in further blocks
        while len(more := file.read(_BLOCK)) == _BLOCK:
            data += _BLOCK
            if not more[504]:
                break
    name, prefix = _string(block[:100]), _string(block[345:500])
    if prefix and block[257:263] == b"ustar\0":
        name = prefix + b"/" + name
    return _Header(name, _number(block[124:136], position), block[156:157], data)


def _number(field: bytes, position: int) -> int:
    """Parse a number: octal digits, or GNU's binary format for large numbers."""
    try:
        number = int.from_bytes(field[1:], "big") if field[0] == 0x80 else int(field.strip(b" \0") or b"0", 8)
    except ValueError:
        number = -1
    if not 0 <= number < 1 << 62:
        raise Damaged(f"the member at byte {position} has no valid size")
    return number


def _string(field: bytes) -> bytes:
    return field.partition(b"\0")[0]


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _pax_records(data: bytes, position: int) -> dict[str, bytes]:
    """Parse pax records: `<length> <key>=<value>` and a newline each, where the length is that of the whole record."""
    records: dict[str, bytes] = {}
    start = 0
    while start < len(data):
        match = _PAX_LENGTH.match(data, start)
        end = start + int(match[1]) if match else 0
        if match is None or not match.end() + 2 < end <= len(data):
            raise Damaged(f"the pax header at byte {position} is broken")
        key, _, value = data[match.end() : end - 1].partition(b"=")
        records[key.decode("utf-8", "replace")] = value
        start = end
    return records
