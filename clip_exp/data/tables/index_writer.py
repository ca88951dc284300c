"""Makes the folder of an index; `tables.index` says what is in it."""

import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa

from clip_exp.data.tables.grouping import group_pictures
from clip_exp.data.tables.options import TableOptions
from clip_exp.data.tables.scan import RowBatch, Scan
from clip_exp.data.tables.stamps import Stamp
from clip_exp.progress import progress
from clip_exp.storage import atomic_folder

_VERSION = 3  # of what the readers make of a file, and of the folder: a change makes new folders
_BAR_FROM = 64 << 20  # bytes; smaller tables are read before a bar is seen


@dataclass(frozen=True)
class TableSource:
    """What an index is of.

    Attributes:
        files: of the table, in order.
        roots: folder that each file's relative image paths start from, absolute.
        options: how they are read.
    """

    files: Sequence[Path]
    roots: Sequence[Path]
    options: TableOptions

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


def write_index(folder: Path, source: TableSource) -> None:
    """Read the table and put its index in the place of the one that is there. Of two processes at the same time one may fail.

    Raises:
        OSError: it cannot be written.
        DataError, ConfigError: see `tables.open`.
    """
    with atomic_folder(folder) as partial:  # who has mapped files of the one that is replaced keeps them
        _write(partial, source)


def checksum(record: dict[str, Any]) -> str:
    """Of what `index.json` says."""
    return hashlib.sha256(json.dumps(record).encode()).hexdigest()


def progress_of(files: Sequence[Path]) -> AbstractContextManager[Callable[[int], None]]:
    """A bar on the terminal for tables that take a while; to be told the bytes that are read."""
    size = sum(file.stat().st_size for file in files)
    if size < _BAR_FROM or not sys.stderr.isatty():
        return nullcontext(lambda done: None)
    return progress(size, f"bytes of {files[0].name}")


def _write(partial: Path, source: TableSource) -> None:
    with progress_of(source.files) as advance:
        scan = Scan(source.files, source.options, advance)
        rows = _write_rows(partial, scan.batches())
    if not (partial / "members.npy").exists():
        _write_groups(partial, scan, source.roots)
    names = sorted(file.name for file in partial.iterdir())
    files = [{**asdict(file), "path": str(file.path.absolute())} for file in scan.read]
    record = {
        "identity": source.identity,
        "rows": rows,
        "content": hashlib.sha256("".join(f"{file.rows} {file.digest}\n" for file in scan.read).encode()).hexdigest(),
        "files": files,
        "stored": {name: _stored(partial / name) for name in names},
    }
    content = {"sha256": checksum(record), "record": record}
    (partial / "index.json").write_text(json.dumps(content), encoding="utf-8")


def _write_rows(partial: Path, batches: Iterator[RowBatch]) -> int:
    """Returns the number of rows."""
    first = next(batches)
    with ExitStack() as stack:
        sink = stack.enter_context(pa.OSFile(str(partial / "rows.arrow"), "wb"))
        strings = stack.enter_context(pa.ipc.new_file(sink, first.columns.schema))
        lines = stack.enter_context(_NpyFile(partial / "lines.npy", ()))
        members = None if first.members is None else stack.enter_context(_NpyFile(partial / "members.npy", (2,)))
        for batch in chain([first], batches):
            strings.write_batch(batch.columns)
            lines.write(batch.lines)
            if members is not None and batch.members is not None:
                members.write(batch.members)
    return lines.rows


def _write_groups(partial: Path, scan: Scan, roots: Sequence[Path]) -> None:
    with pa.memory_map(str(partial / "rows.arrow")) as source:
        paths = pa.ipc.open_file(source).read_all()["image_key"]
        groups = group_pictures(paths, [file.rows for file in scan.read], roots)
    pa.default_memory_pool().release_unused()  # 0.1 GB per million distinct paths, which a long run has better uses for
    if groups is not None:
        for name, values in groups._asdict().items():
            np.save(partial / f"{name}.npy", values)


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


def _stored(file: Path) -> list[Any]:
    stamp = Stamp.of(file)
    return [stamp.bytes, stamp.sample]
