"""Reader for WebDataset shards: tar files in which the adjacent members with the same key are a sample.

Nothing is extracted, and no member name is used as a path.
"""

import io
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from clip_exp.config.data import OnBadRow
from clip_exp.data.tables.columns import string_array
from clip_exp.data.tables.jsonl import NativeColumns, parse_object
from clip_exp.data.tables.reader import (
    BadRows,
    BadValue,
    RowBlock,
    TableOptions,
    absent,
    is_column,
    key_of,
    max_length,
    no_column,
    text_of,
    what_of,
)
from clip_exp.errors import ConfigError, DataError

# Members of a tar. `tarfile` is not used, because it takes a damaged header for the end of the archive and is four
# times slower.

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


# Samples: adjacent members with the same key.

IMAGES = ("jpg", "png", "jpeg", "webp", "gif", "bmp")  # the first one in a sample is used, as in open_clip
_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)  # key and extension as in webdataset
_BLOCK_ROWS = 1 << 12
_BLOCK_BYTES = 64 << 20  # limit for a block, because a filter may use long lists in the JSON
_MAX_JSON = 1 << 20  # bytes
_MAX_ARRAY = 16 << 20  # bytes


@dataclass
class _Row:
    values: list[str]  # requested ones of image name, caption, label and further columns
    image: Member
    record: dict[str, Any]  # keys of the filter


class ShardReader:
    """`tables.reader.Reader` for a WebDataset tar.

    The key of a member is its name up to the first dot after the last slash, without `./`. Names without a key and
    hidden files are ignored, as in webdataset. A sample consists of
    - the image: the member with the extension `image_key`, else the first of `IMAGES`;
    - caption and label: the member with the extension `caption_key` (`label_key`), else that key of the .json; if
      neither exists, the .txt is the caption;
    - further columns: likewise a member or a key of the .json. A .npy contains numbers;
    - columns for the filter: the keys of the .json, the members by extension, and the values above.
    Links, devices, sparse files, absolute names and names with `..` make the sample bad.

    Args:
        path: existing file.
        options: columns and rows to read.
    """

    def __init__(self, path: Path, options: TableOptions) -> None:
        self.path, self.options, self.requested = path, options, options.requested
        self.bad = BadRows(path, options.on_bad_row is OnBadRow.skip, unit="sample")
        self.bytes_read = 0
        self._extra = NativeColumns(options.filtered)
        self.filtered = self._extra.names

    def blocks(self) -> Iterator[RowBlock]:
        """See `tables.reader.Reader`. `members` has offset and size of each image."""
        rows: list[_Row] = []
        samples: list[int] = []
        try:
            with open(self.path, "rb") as file:
                for sample, row in self._rows(file):
                    rows.append(row)
                    samples.append(sample)
                    if len(rows) == _BLOCK_ROWS or row.image.offset - self.bytes_read >= _BLOCK_BYTES:
                        self.bytes_read = row.image.offset
                        yield self._block(rows, samples)
                        rows, samples = [], []
        except OSError as error:
            raise ConfigError(f"The shard {self.path} cannot be read: {error.strerror or error}.") from error
        if rows:
            yield self._block(rows, samples)
        if missing := self._extra.never_seen():
            raise DataError(f"{self.path} {no_column(missing, 'filter', self._extra.seen)}")

    def _block(self, rows: list[_Row], samples: list[int]) -> RowBlock:
        values = zip(*(row.values for row in rows), strict=True)
        columns = dict(zip(self.requested, map(string_array, values), strict=True))
        places = np.array([(row.image.offset, row.image.size) for row in rows], dtype=np.int64)
        extra = self._extra.arrays([row.record for row in rows])
        return RowBlock(columns, np.array(samples, dtype=np.int64), places, extra)

    def _rows(self, file: BinaryIO) -> Iterator[tuple[int, _Row]]:
        """Yield number and row of each good sample. In a truncated shard, the samples before the damage are good."""
        keys: set[str] = set()
        number = 0
        try:
            for number, (key, group) in enumerate(groupby(_keyed(members(file)), key=lambda found: found[0]), 1):
                # Consume the whole group, so that iteration continues with the next sample if this one is bad.
                found = [(extension, member) for _, extension, member in group]
                try:
                    yield number, self._row(file, _sample(key, found, keys))
                except BadValue as bad:
                    self.bad.add(number, bad.reason, f"{bad.detail} (sample {key!r})")
        except Damaged as error:
            if not number:
                raise DataError(f"{self.path} is not a readable tar: {error}.") from error
            self.bad.add(number, "damaged shard", f"the shard is damaged here: {error}", "Download it again")

    def _row(self, file: BinaryIO, sample: dict[str, Member]) -> _Row:
        image = next((sample[each] for each in (self.options.image_key.lower(), *IMAGES) if each in sample), None)
        if image is None:
            raise BadValue("no image", f"there is no image among the members {', '.join(sample)}")
        texts = {setting: name for setting, name in self.requested.items() if setting != "image_key"}
        in_members = all(name.lower() in sample for name in texts.values())
        record: dict[str, Any] = {}
        if "json" in sample and (self.filtered or not in_members):
            record = parse_object(_read(file, sample["json"], _MAX_JSON, "JSON"))
        values = [image.name, *(_value(file, sample, record, setting, name) for setting, name in texts.items())]
        if not self.filtered:
            return _Row(values, image, {})
        named = [name for name in self.filtered if name.lower() in sample]
        read = {name: _text(file, sample[name.lower()], "caption_key", name) for name in named}
        columns = {**dict(zip(self.requested.values(), values, strict=True)), **read, **record}
        return _Row(values, image, self._extra.of_record(columns))


def _keyed(found: Iterator[Member]) -> Iterator[tuple[str, str, Member]]:
    """Yield key, extension and member for each member that has a key."""
    for member in found:
        if match := _NAME.fullmatch(_plain(member.name)):
            yield match[1], match[2].lower(), member


def _plain(name: str) -> str:
    """Return a name without `.` and empty parts: `tar -cf x.tar .` writes `./1.jpg`.

    Parts `..` stay, and are refused later.
    """
    if "./" not in name and "//" not in name:
        return name
    return "/" * name.startswith("/") + "/".join(part for part in name.split("/") if part not in ("", "."))


def _sample(key: str, found: list[tuple[str, Member]], keys: set[str]) -> dict[str, Member]:
    """Return the members by extension, and add the key to `keys`. Raises BadValue."""
    extensions = [extension for extension, _ in found]
    if key in keys or len(set(extensions)) < len(extensions):
        detail = "its key appears twice; the members of a sample must be adjacent (tar --sort=name)"
        raise BadValue("duplicate key", detail)
    keys.add(key)
    for _, member in found:
        if member.fault:
            raise BadValue("not a regular file", f"its member {member.name!r} is {member.fault}")
    if not key.isprintable() and any("\udc80" <= character <= "\udcff" for character in key):
        raise BadValue("not UTF-8", "its name is not UTF-8")
    if key.startswith("/") or ".." in PurePosixPath(key).parts:
        raise BadValue("unsafe name", "its name is absolute or contains '..'")
    return dict(found)


def _value(file: BinaryIO, sample: dict[str, Member], record: dict[str, Any], setting: str, name: str) -> str:
    """Return a value except the image: a member, or a value of the sample's JSON, or the .txt for a caption."""
    if is_column(setting) and f".{name.lower()}".endswith(".npy") and name.lower() in sample:
        return text_of(setting, name, _array(file, sample[name.lower()], setting))
    if name.lower() in sample:
        return _text(file, sample[name.lower()], setting, name)
    if record.get(name) is None and setting == "caption_key" and "txt" in sample:
        return _text(file, sample["txt"], setting, "txt")
    if name not in record:
        reason, _ = absent(setting, name)
        listed = f", and its .json has only {', '.join(map(repr, record))}" if record else ""
        raise BadValue(reason, f"{reason}: there is no member .{name}{listed}; check data.{key_of(setting)}")
    return text_of(setting, name, record[name])


def _text(file: BinaryIO, member: Member, setting: str, name: str) -> str:
    """Return the text of a member, verbatim."""
    try:
        text = _read(file, member, 4 * max_length(setting), what_of(setting)).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadValue(
            "not UTF-8", f"its {member.name!r} is not UTF-8 ({error.reason} at byte {error.start})"
        ) from error
    return text_of(setting, name, text)


def _array(file: BinaryIO, member: Member, setting: str) -> np.ndarray:
    """Return the array in a .npy member. Nothing is unpickled."""
    try:
        return np.load(io.BytesIO(_read(file, member, _MAX_ARRAY, what_of(setting))), allow_pickle=False)
    except (ValueError, OSError, EOFError, MemoryError) as error:
        detail = f"its {member.name!r} is not a .npy file of numbers"
        raise BadValue(f"the {what_of(setting)} is not numbers", detail) from error


def _read(file: BinaryIO, member: Member, limit: int, what: str) -> bytes:
    if member.size > limit:
        raise BadValue(f"{what} too long", f"its {member.name!r} has {member.size:,} bytes, more than {limit:,}")
    file.seek(member.offset)
    return file.read(member.size)
