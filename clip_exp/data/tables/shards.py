"""Reader for WebDataset shards: tar files in which the adjacent members with the same key are a sample.

Nothing is extracted, and no member name is used as a path.
"""

import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from clip_exp.config.data import OnBadRow
from clip_exp.data.tables.reader import BadRows, BadValue, RowBlock, TableOptions
from clip_exp.data.tables.records import Records
from clip_exp.data.tables.samples import SampleReader
from clip_exp.data.tables.tar import Damaged, Member, members
from clip_exp.errors import ConfigError, DataError

_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)  # key and extension as in webdataset
_INCOMPLETE = ("no image", "no caption")


class ShardReader:
    """`tables.reader.Reader` for a WebDataset tar.

    The key of a member is its name up to the first dot after the last slash, without `./`. Names without a key and
    hidden files are ignored, as in webdataset. `tables.samples` describes what a sample consists of. Links, devices,
    sparse files, absolute names and names with `..` make the sample bad.

    Args:
        path: existing file.
        options: columns and rows to read.
    """

    def __init__(self, path: Path, options: TableOptions) -> None:
        self.path, self.options = path, options
        self.bad = BadRows(path, options.on_bad_row is OnBadRow.skip, unit="sample")
        self.bytes_read = 0
        self._records = Records(options, self.bad)

    def blocks(self) -> Iterator[RowBlock]:
        """See `tables.reader.Reader`. `members` has offset and size of each image."""
        try:
            with open(self.path, "rb") as file:
                for position in self._read(file):
                    if self._records.is_full:
                        self.bytes_read = position
                        yield self._records.block()
        except OSError as error:
            raise ConfigError(f"The shard {self.path} cannot be read: {error.strerror or error}.") from error
        if len(self._records):
            yield self._records.block()
        if problem := self._records.unknown_column():
            raise DataError(f"{self.path} {problem}")

    def _read(self, file: BinaryIO) -> Iterator[int]:
        """Add each good sample to the records; yield the position of its image.

        In a truncated shard, the samples before the damage are good.
        """

        def read(member: Member) -> bytes:
            file.seek(member.offset)
            return file.read(member.size)

        reader = SampleReader(self.options, read)
        keys: set[str] = set()
        number = 0
        try:
            for number, (key, group) in enumerate(groupby(_keyed(members(file)), key=lambda found: found[0]), 1):
                # Consume the whole group, so that iteration continues with the next sample if this one is bad.
                found = [(extension, member) for _, extension, member in group]
                try:
                    sample = _sample(key, found, keys)
                    image = reader.image_of(sample)
                    record = reader.record_of(sample, image)
                    size = sum(member.size for member in sample.values()) - image.size
                    self._records.add(number, record, size, members=(image.offset, image.size))
                except BadValue as bad:
                    detail = bad.detail
                    if bad.reason in _INCOMPLETE and not self.bad.skip and _has_others(file, key, len(found)):
                        detail = "its members are not adjacent, as those of a sample must be: create the tar with --sort=name"
                    self.bad.add(number, bad.reason, f"{detail} (sample {key!r})")
                    continue
                yield image.offset
        except Damaged as error:
            if not number:
                raise DataError(f"{self.path} is not a readable tar: {error}.") from error
            self.bad.add(number, "damaged shard", f"the shard is damaged here: {error}", "Download it again")


def _has_others(file: BinaryIO, key: str, count: int) -> bool:
    """Return True if a shard has more members with a key than the adjacent ones."""
    try:
        return sum(other == key for other, _, _ in _keyed(members(file))) > count
    except Damaged:
        return False


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
