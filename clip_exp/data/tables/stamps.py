"""Whether a file is still the one that was read: its size, the time of its last change, and a sample of its content."""

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

from clip_exp.errors import ConfigError

_BLOCK = 1 << 14  # bytes
_MOST_BLOCKS, _FEWEST_BLOCKS = 256, 2  # of a file
_ALL_BLOCKS = 4096  # of a table's files together, where they are many


class Stamp(NamedTuple):
    """What is known of a file without reading all of it."""

    bytes: int
    mtime_ns: int
    sample: str  # hash of the first, the last and evenly spread blocks; of everything in a file that is no longer than these

    @classmethod
    def of(cls, file: Path, files: int = 1) -> "Stamp":
        """The stamp of a file.

        Args:
            files: how many are looked at together; each of many is sampled less.

        Raises: OSError.
        """
        blocks = min(_MOST_BLOCKS, max(_FEWEST_BLOCKS, _ALL_BLOCKS // files))
        with open(file, "rb", buffering=0) as stream:
            status = os.fstat(stream.fileno())
            digest = hashlib.sha256()
            for offset in _offsets(status.st_size, blocks):
                digest.update(os.pread(stream.fileno(), _BLOCK, offset))
        return cls(status.st_size, status.st_mtime_ns, digest.hexdigest())

    @classmethod
    def of_table(cls, file: Path, files: int) -> "Stamp":
        """`of` a file that the configuration names.

        Raises: ConfigError.
        """
        try:
            return cls.of(file, files)
        except OSError as error:
            raise ConfigError(f"The table {file} cannot be read: {error.strerror or error}.") from error


def _offsets(size: int, blocks: int) -> list[int]:
    if size <= blocks * _BLOCK:
        return list(range(0, size, _BLOCK))
    return [(size - _BLOCK) * i // (blocks - 1) for i in range(blocks)]
