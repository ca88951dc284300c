"""The rows of a table in files that processes map into their memory: made once, and used as long as the table's files stay the same.

An index is a folder `<stem of the first file>-<16 hex digits>`:

    index.json     which files were read how, their stamps, bad rows and digests; the stamps of the files beside it
    rows.arrow     Arrow IPC: the strings, in batches of `BATCH_ROWS` rows
    lines.npy      int64 [rows]
    members.npy    int64 [rows, 2], of shards
    image_index.npy, order.npy, offsets.npy    see `PictureGroups`; absent where every row has a picture of its own

It appears complete or not at all. Nothing in it is unpickled.
"""

import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from clip_exp.config.data_schema import OnBadRow
from clip_exp.data.tables.formats import open_reader
from clip_exp.data.tables.grouping import PictureGroups
from clip_exp.data.tables.index_writer import TableSource, checksum, write_index
from clip_exp.data.tables.scan import BATCH_ROWS, ScannedFile
from clip_exp.data.tables.stamps import Stamp
from clip_exp.data.tables.unlike import Unlike
from clip_exp.errors import DataError
from clip_exp.storage import lock, remove_leftovers

log = logging.getLogger(__name__)


class MappedRows:
    """`table.StoredRows` in an index. Pickles as the folder's name.

    Args:
        folder: of the index.
        content: hash of the rows that are expected.

    Raises: DataError where the folder does not hold them any more.
    """

    def __init__(self, folder: Path, content: str) -> None:
        try:
            record = _read_record(folder)
            if record["content"] != content:
                raise ValueError("other rows")
            self._map(folder, record)
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
            raise DataError(
                f"{folder}, the index of a table in use, is gone or was made anew ({error}): start again."
            ) from error

    def __reduce__(self) -> tuple[Any, ...]:
        return MappedRows, (self._folder, self._content)

    def _map(self, folder: Path, record: dict[str, Any]) -> None:
        self._folder, self._content = folder, record["content"]
        reader = pa.ipc.open_file(pa.memory_map(str(folder / "rows.arrow")))
        self.batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        arrays = {name.removesuffix(".npy"): folder / name for name in record["stored"] if name.endswith(".npy")}
        mapped = {name: _map_array(file) for name, file in arrays.items()}
        self.lines, self.members = mapped["lines"], mapped.get("members")
        sizes = [len(batch) for batch in self.batches]
        if any(size != BATCH_ROWS for size in sizes[:-1]) or not sum(sizes) == len(self.lines) == record["rows"]:
            raise ValueError("batches of a wrong size")
        names = PictureGroups._fields
        self.groups = PictureGroups(*(mapped[name] for name in names)) if names[0] in mapped else None


def open_index(source: TableSource, index_dir: Path) -> tuple[MappedRows, list[ScannedFile]]:
    """The rows of a table from its index, which is made if there is none that fits. Any number of processes may do so at once.

    Args:
        source: the table.
        index_dir: where indexes are kept.

    Raises:
        OSError: the folder cannot be written.
        DataError, ConfigError: see `tables.open`.
    """
    folder = index_dir.absolute() / source.name  # worker processes open it by its name
    if found := _load(folder, source):
        return found
    if not index_dir.exists():  # a table that is none leaves nothing behind
        next(iter(open_reader(source.files[0], source.options).blocks()), None)
    index_dir.mkdir(parents=True, exist_ok=True)

    def report() -> None:
        log.warning("Waiting for another process that reads %s.", source.files[0])

    with lock(index_dir / f".{source.name}.lock", wait_s=math.inf, on_wait=report) as alone:
        if found := _load(folder, source):  # another process was first
            return found
        if alone:
            remove_leftovers(folder)
        try:
            write_index(folder, source)
        except OSError:
            # Without a lock another process may have put the same index in place at this moment.
            if alone or (found := _load(folder, source)) is None:
                raise
            return found
        found = _load(folder, source)
    if found is None:
        raise DataError(f"{source.files[0]} has changed while it was read: start again when it is complete.")
    return found


def _load(folder: Path, source: TableSource) -> tuple[MappedRows, list[ScannedFile]] | None:
    """The index, unless something about it does not fit."""
    try:
        record = _read_record(folder)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError):
        record = {}
    try:
        if record["identity"] != source.identity:
            raise ValueError("of another table")
        for name, expected in record["stored"].items():
            stamp = Stamp.of(folder / name)
            if [stamp.bytes, stamp.sample] != expected:
                raise ValueError(name)
        read = [_scanned(entry) for entry in record["files"]]
        rows = MappedRows(folder, record["content"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, DataError):
        log.warning("%s is damaged: the index is made anew.", folder)
        return None
    if any(Stamp.of_table(file.path, len(source.files)) != file.stamp for file in read):
        log.info("%s has changed: its index is made anew.", source.files[0])
        return None
    if source.options.on_bad_row is OnBadRow.error and any(file.bad for file in read):
        return None  # reading tells what is wrong with the first of them
    return rows, read


def _read_record(folder: Path) -> dict[str, Any]:
    content = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    if not isinstance(content, dict) or checksum(content["record"]) != content["sha256"]:
        raise ValueError("index.json is damaged")
    return content["record"]


def _map_array(file: Path) -> np.ndarray:
    return np.load(file, mmap_mode="r", allow_pickle=False).view(np.ndarray)


def _scanned(entry: dict[str, Any]) -> ScannedFile:
    read = {
        "path": Path(entry["path"]),
        "stamp": Stamp(*entry["stamp"]),
        "bad_examples": tuple((line, reason) for line, reason in entry["bad_examples"]),
        "unlike": tuple(Unlike(**each) for each in entry["unlike"]),
    }
    return ScannedFile(**{**entry, **read})
