"""The rows of a table in files that processes map into their memory: made once, and used as long as the table's files stay the same.

An index is a folder `<stem of the first file>-<16 hex digits>`:

    index.json     which files were read how, their signatures, bad rows and digests; the signatures of the files beside it
    rows.arrow     Arrow IPC: the strings, in batches of `BATCH_ROWS` rows
    lines.npy      int64 [rows]
    members.npy    int64 [rows, 2], of shards
    image_index.npy, order.npy, offsets.npy    see `ImageGroups`; absent where every row has an image of its own

It appears complete or not at all. Nothing in it is unpickled.
"""

import hashlib
import json
import logging
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa

from clip_exp.config.data import OnBadRow
from clip_exp.data.tables.filters import UnconvertedValues
from clip_exp.data.tables.reader import FileSignature, RowBlock, TableOptions
from clip_exp.data.tables.scan import BATCH_ROWS, Scan, ScannedFile, open_reader, progress_of
from clip_exp.data.tables.table import ImageGroups, group_images
from clip_exp.errors import DataError
from clip_exp.storage import atomic_folder, lock, remove_leftovers

log = logging.getLogger(__name__)

_VERSION = 4  # of what the readers make of a file, and of the folder: a change makes new folders


@dataclass(frozen=True)
class TableSource:
    """What an index is of."""

    files: Sequence[Path]  # of the table, in order
    roots: Sequence[Path]  # folder that each file's relative image paths start from, absolute
    options: TableOptions  # how they are read

    @property
    def identity(self) -> dict[str, Any]:
        """Equal for equal tables, whether the files have changed or not."""
        files, roots = [str(file.absolute()) for file in self.files], [str(root) for root in self.roots]
        return {"version": _VERSION, "files": files, "roots": roots, "options": self.options.as_json()}

    @property
    def name(self) -> str:
        """Of the index's folder."""
        digest = hashlib.sha256(json.dumps(self.identity).encode()).hexdigest()
        return f"{re.sub(r'[^A-Za-z0-9_.-]+', '_', self.files[0].stem)[:40]}-{digest[:16]}"


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
            reader = pa.ipc.open_file(pa.memory_map(str(folder / "rows.arrow")))
            self.batches: Sequence[pa.RecordBatch] = [reader.get_batch(i) for i in range(reader.num_record_batches)]
            mapped = {
                name.removesuffix(".npy"): np.load(folder / name, mmap_mode="r", allow_pickle=False).view(np.ndarray)
                for name in record["stored"]
                if name.endswith(".npy")
            }
            self.lines = mapped["lines"]
            self.members: np.ndarray | None = mapped.get("members")
            sizes = [len(batch) for batch in self.batches]
            if any(size != BATCH_ROWS for size in sizes[:-1]) or not sum(sizes) == len(self.lines) == record["rows"]:
                raise ValueError("batches of a wrong size")
            names = ImageGroups._fields
            self.groups = ImageGroups(*(mapped[name] for name in names)) if names[0] in mapped else None
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
            raise DataError(
                f"{folder}, the index of a table in use, is gone or was made anew ({error}): start again."
            ) from error
        self._folder, self._content = folder, content

    def __reduce__(self) -> tuple[Any, ...]:
        return MappedRows, (self._folder, self._content)


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
            if _stored(folder / name) != expected:
                raise ValueError(name)
        read = []
        for entry in record["files"]:
            values = {
                "path": Path(entry["path"]),
                "signature": FileSignature(*entry["signature"]),
                "bad_examples": tuple((line, reason) for line, reason in entry["bad_examples"]),
                "unconverted": tuple(UnconvertedValues(**each) for each in entry["unconverted"]),
            }
            read.append(ScannedFile(**{**entry, **values}))
        rows = MappedRows(folder, record["content"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, DataError):
        log.warning("%s is damaged: the index is made anew.", folder)
        return None
    if any(FileSignature.of_table(file.path, len(source.files)) != file.signature for file in read):
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


# Writing an index.


def write_index(folder: Path, source: TableSource) -> None:
    """Read the table and put its index in the place of the one that is there. Of two processes at the same time one may fail.

    Raises:
        OSError: it cannot be written.
        DataError, ConfigError: see `tables.open`.
    """
    with atomic_folder(folder) as partial:  # who has mapped files of the one that is replaced keeps them
        with progress_of(source.files) as advance:
            scan = Scan(source.files, source.options, advance)
            rows = _write_rows(partial, scan.blocks())
        if not (partial / "members.npy").exists():
            _write_groups(partial, scan, source.roots)
        names = sorted(file.name for file in partial.iterdir())
        files = [{**asdict(file), "path": str(file.path.absolute())} for file in scan.read]
        record = {
            "identity": source.identity,
            "rows": rows,
            "content": hashlib.sha256(
                "".join(f"{file.rows} {file.digest}\n" for file in scan.read).encode()
            ).hexdigest(),
            "files": files,
            "stored": {name: _stored(partial / name) for name in names},
        }
        content = {"sha256": checksum(record), "record": record}
        (partial / "index.json").write_text(json.dumps(content), encoding="utf-8")


def _write_rows(partial: Path, blocks: Iterator[RowBlock]) -> int:
    """Write `rows.arrow`, `lines.npy` and `members.npy`; return the number of rows."""
    first = next(blocks)
    with ExitStack() as stack:
        sink = stack.enter_context(pa.OSFile(str(partial / "rows.arrow"), "wb"))
        strings = stack.enter_context(pa.ipc.new_file(sink, first.batch.schema))
        lines = stack.enter_context(_NpyFile(partial / "lines.npy", ()))
        members = None if first.members is None else stack.enter_context(_NpyFile(partial / "members.npy", (2,)))
        for block in chain([first], blocks):
            strings.write_batch(block.batch)
            lines.write(block.lines)
            if members is not None and block.members is not None:
                members.write(block.members)
    return lines.rows


class _NpyFile:
    """A .npy file of int64 whose rows are written as they come."""

    def __init__(self, path: Path, row_shape: tuple[int, ...]) -> None:
        self.rows, self._row_shape = 0, row_shape
        self._file = open(path, "wb")  # noqa: SIM115 - closed by __exit__
        self._write_header()

    def __enter__(self) -> "_NpyFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            if error is None:
                self._file.seek(0)
                self._write_header()  # as long as before: NumPy leaves room for the number of rows to grow

    def write(self, rows: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(rows, dtype=np.int64).data)
        self.rows += len(rows)

    def _write_header(self) -> None:
        header = {"descr": "<i8", "fortran_order": False, "shape": (self.rows, *self._row_shape)}
        np.lib.format.write_array_header_1_0(self._file, header)


def _write_groups(partial: Path, scan: Scan, roots: Sequence[Path]) -> None:
    with pa.memory_map(str(partial / "rows.arrow")) as source:
        paths = pa.ipc.open_file(source).read_all()["image_key"]
        groups = group_images(paths, [file.rows for file in scan.read], roots)
    pa.default_memory_pool().release_unused()  # 0.1 GB per million distinct paths, which a long run has better uses for
    if groups is not None:
        for name, values in groups._asdict().items():
            np.save(partial / f"{name}.npy", values)


def _stored(file: Path) -> list[Any]:
    signature = FileSignature.of(file)
    return [signature.bytes, signature.sample]


def checksum(record: dict[str, Any]) -> str:
    """Of what `index.json` says."""
    return hashlib.sha256(json.dumps(record).encode()).hexdigest()
