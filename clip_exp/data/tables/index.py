"""Memory-mapped index of a table's rows, built once and reused until a file of the table changes.

An index is a folder `<stem of the first file>-<16 hex digits>`:

    index.json     options; signature, bad rows and digest of each file of the table; checksums of the files below
    rows.arrow     Arrow IPC: the strings, in batches of `BATCH_ROWS` rows
    lines.npy, members.npy, caption_columns.npy    see `RowBlock.numbers`; the last two only if there are any
    images.bin     content of the images that were in the table itself, as in Parquet
    image_index.npy, order.npy, offsets.npy    see `ImageGroups`; absent if every row has its own image

The folder is created atomically. Nothing in it is unpickled.
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
from clip_exp.data.tables.captions import COLUMN
from clip_exp.data.tables.reader import FileSignature, RowBlock, TableOptions
from clip_exp.data.tables.scan import BATCH_ROWS, Scan, ScannedFile, open_reader, progress_of
from clip_exp.data.tables.store import ImageStore
from clip_exp.data.tables.table import ImageGroups, group_images, group_members
from clip_exp.data.tables.unconverted import UnconvertedValues
from clip_exp.errors import DataError
from clip_exp.storage import atomic_folder, lock, remove_leftovers

log = logging.getLogger(__name__)

IMAGES = "images.bin"
_VERSION = 5  # part of the folder's name; increase it when the readers or the format of the folder change


@dataclass(frozen=True)
class TableSource:
    """Files and options of a table."""

    files: Sequence[Path]  # files of the table, in order
    roots: Sequence[Path]  # absolute folder of the relative image paths, for each file
    options: TableOptions

    @property
    def identity(self) -> dict[str, Any]:
        """JSON values that are equal for the same files and options, even if the content of a file has changed."""
        files, roots = [str(file.absolute()) for file in self.files], [str(root) for root in self.roots]
        return {"version": _VERSION, "files": files, "roots": roots, "options": self.options.as_json()}

    @property
    def name(self) -> str:
        """Name of the index's folder."""
        digest = hashlib.sha256(json.dumps(self.identity).encode()).hexdigest()
        return f"{re.sub(r'[^A-Za-z0-9_.-]+', '_', self.files[0].stem)[:40]}-{digest[:16]}"


class MappedRows:
    """`table.StoredRows` in an index. It pickles as the name of the folder, so worker processes map the same files.

    Args:
        folder: folder of the index.
        content: expected hash of the rows.

    Raises: DataError if the folder no longer has these rows.
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
            self.caption_columns: np.ndarray | None = mapped.get(COLUMN)
            self.images = folder / IMAGES if IMAGES in record["stored"] else None
            sizes = [len(batch) for batch in self.batches]
            if any(size != BATCH_ROWS for size in sizes[:-1]) or not sum(sizes) == len(self.lines) == record["rows"]:
                raise ValueError("batches of a wrong size")
            names = ImageGroups._fields
            self.groups = ImageGroups(*(mapped[name] for name in names)) if names[0] in mapped else None
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
            raise DataError(
                f"The index {folder} was removed or rebuilt while it was in use ({error}): start again."
            ) from error
        self._folder, self._content = folder, content

    def __reduce__(self) -> tuple[Any, ...]:
        return MappedRows, (self._folder, self._content)


def open_index(source: TableSource, index_dir: Path) -> tuple[MappedRows, list[ScannedFile]]:
    """Return the rows of a table from its index, which is built if there is no valid one.

    Several processes may call this at the same time.

    Args:
        source: files and options of the table.
        index_dir: parent folder of the indexes.

    Raises:
        OSError: the folder cannot be written.
        DataError, ConfigError: see `tables.open`.
    """
    folder = index_dir.absolute() / source.name  # absolute, because worker processes open it by name
    if found := _load(folder, source):
        return found
    # Read a first block before creating a folder, so that an invalid table leaves no empty folder behind.
    if not index_dir.exists():
        next(iter(open_reader(source.files[0], source.options).blocks()), None)
    index_dir.mkdir(parents=True, exist_ok=True)

    def report() -> None:
        log.warning("Waiting for another process that is reading %s.", source.files[0])

    with lock(index_dir / f".{source.name}.lock", wait_s=math.inf, on_wait=report) as locked:
        if found := _load(folder, source):  # another process has built it meanwhile
            return found
        if locked:
            remove_leftovers(folder)
        try:
            write_index(folder, source)
        except OSError:
            # On a file system without locks, another process may have created the same index at this moment.
            if locked or (found := _load(folder, source)) is None:
                raise
            return found
        found = _load(folder, source)
    if found is None:
        raise DataError(f"{source.files[0]} changed while it was being read: start again when it is complete.")
    return found


def _load(folder: Path, source: TableSource) -> tuple[MappedRows, list[ScannedFile]] | None:
    """Load an index; None if it is missing, damaged or outdated."""
    try:
        record = _read_record(folder)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError):
        record = {}
    try:
        if record["identity"] != source.identity:
            raise ValueError("index of another table")
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
        log.warning("The index %s is damaged and will be rebuilt.", folder)
        return None
    if any(FileSignature.of_table(file.path, len(source.files)) != file.signature for file in read):
        log.info("%s has changed: rebuilding its index.", source.files[0])
        return None
    if source.options.on_bad_row is OnBadRow.error and any(file.bad for file in read):
        return None  # reading the table again raises the error of the first bad row
    return rows, read


def _read_record(folder: Path) -> dict[str, Any]:
    content = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    if not isinstance(content, dict) or checksum(content["record"]) != content["sha256"]:
        raise ValueError("index.json is damaged")
    return content["record"]


# Writing an index.


def write_index(folder: Path, source: TableSource) -> None:
    """Read the table and replace its index. If two processes do this at the same time, one may fail.

    Raises:
        OSError: the index cannot be written.
        DataError, ConfigError: see `tables.open`.
    """
    with atomic_folder(folder) as partial:  # processes that have mapped the replaced files keep them
        with progress_of(source.files) as advance, ImageStore(partial / IMAGES) as images:
            scan = Scan(source.files, source.options, advance, images.add)
            rows = _write_rows(partial, scan.blocks())
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
    """Write `rows.arrow` and a .npy file for each of the numbers; return the number of rows."""
    first = next(blocks)
    with ExitStack() as stack:
        sink = stack.enter_context(pa.OSFile(str(partial / "rows.arrow"), "wb"))
        strings = stack.enter_context(pa.ipc.new_file(sink, first.batch.schema))
        files = {
            name: stack.enter_context(_NpyFile(partial / f"{name}.npy", values.dtype, values.shape[1:]))
            for name, values in first.numbers.items()
        }
        for block in chain([first], blocks):
            strings.write_batch(block.batch)
            for name, file in files.items():
                file.write(block.numbers[name])
    return files["lines"].rows


class _NpyFile:
    """Writer of a .npy file that appends rows."""

    def __init__(self, path: Path, dtype: np.dtype, row_shape: tuple[int, ...]) -> None:
        self.rows, self._dtype, self._row_shape = 0, dtype, row_shape
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
                self._write_header()  # of the same length: NumPy reserves space for the number of rows to grow

    def write(self, rows: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(rows, dtype=self._dtype).data)
        self.rows += len(rows)

    def _write_header(self) -> None:
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": (self.rows, *self._row_shape)}
        np.lib.format.write_array_header_1_0(self._file, header)


def _write_groups(partial: Path, scan: Scan, roots: Sequence[Path]) -> None:
    rows = [file.rows for file in scan.read]
    if (members := partial / "members.npy").exists():
        groups = group_members(np.load(members, mmap_mode="r"), rows)
    else:
        with pa.memory_map(str(partial / "rows.arrow")) as source:
            groups = group_images(pa.ipc.open_file(source).read_all()["image_key"], rows, roots)
    pa.default_memory_pool().release_unused()  # 0.1 GB per million distinct paths
    if groups is not None:
        for name, values in groups._asdict().items():
            np.save(partial / f"{name}.npy", values)


def _stored(file: Path) -> list[Any]:
    signature = FileSignature.of(file)
    return [signature.bytes, signature.sample]


def checksum(record: dict[str, Any]) -> str:
    """Return the checksum of the record in `index.json`."""
    return hashlib.sha256(json.dumps(record).encode()).hexdigest()
