"""Readers for Parquet and Arrow, which read only the requested columns.

The image column has paths, or the images themselves: binary, or a struct of `bytes` and `path` as the library `datasets` writes it.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clip_exp.config.data import OnBadRow
from clip_exp.data.tables.columns import bool_numpy, is_list, rows_of_numbers, string_array
from clip_exp.data.tables.reader import (
    MAX_CAPTION,
    BadRows,
    BadValue,
    RowBlock,
    TableOptions,
    absent,
    conventional,
    is_caption,
    is_column,
    is_optional,
    key_of,
    longer_than,
    max_length,
    no_column,
    text_of,
    unreadable,
    value_of,
)
from clip_exp.errors import DataError

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

_BLOCK_ROWS = 1 << 12
_BLOCK_BYTES = 64 << 20  # limit for the texts of a block
# Read-ahead buffer for a column's pages. Without it, Arrow reads a whole row group at once, which is slow.
_BUFFER_BYTES = 1 << 20
_SMALL_BYTES = 16 << 20  # columns of a row group up to this size are cheap to read as a dictionary
_MAX_BYTES = 4 * MAX_CAPTION  # a text with more bytes has too many characters, whatever they are
_REQUIRED_TYPES = {
    "image_key": "but it must be the paths of image files, as strings, or images: binary, or a struct of bytes and path",
    "caption_key": "but captions must be strings or lists of strings",
    "label_key": "but labels must be strings or integers",
    "columns": "but further columns must be strings, numbers or lists of numbers",
    "filter": "which a filter cannot compare",
}


class ColumnReader(ABC):
    """`tables.reader.Reader` for a format with typed columns.

    Paths must be strings, plain or dictionary-encoded, and captions strings or lists of strings. Labels may also be integers, and
    further columns numbers or lists of numbers. A null makes a bad row, except for a label, where it is the empty label.

    Args:
        path: existing file.
        options: columns and rows to read.
    """

    format: ClassVar[str]

    def __init__(self, path: Path, options: TableOptions) -> None:
        self.path, self.options = path, options
        self.requested = options.requested
        self.filtered = sorted(options.filtered)
        self.bad = BadRows(path, options.on_bad_row is OnBadRow.skip, unit="row")
        self.bytes_read = 0
        self._paths_only: bool | None = None  # whether a struct of images has only their paths

    @abstractmethod
    def _batches(self) -> Iterator[tuple[pa.RecordBatch, int]]:
        """Yield batches of the requested columns, each with the position of its end, in bytes."""

    def blocks(self) -> Iterator[RowBlock]:
        """See `tables.reader.Reader`."""
        rows = 0
        try:
            for batch, position in self._batches():
                yield self._block(batch, rows)
                rows += len(batch)
                self.bytes_read = position
        except PermissionError as error:
            raise unreadable(self.path, error) from error
        except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
            reason = str(error).partition("\n")[0].rstrip(". ") or type(error).__name__
            fix = "Decrypt it." if "crypt" in reason.lower() else "Check that the file is complete."
            raise DataError(f"{self.path} cannot be read as {self.format} after row {rows}: {reason}. {fix}") from error

    def _check_columns(self, schema: pa.Schema) -> None:
        self.requested = conventional(self.requested, schema.names)
        requested = [*self.requested.items(), *(("filter", name) for name in self.filtered)]
        for setting, name in requested:
            count = schema.names.count(name)
            if count > 1:
                raise DataError(f"{self.path} has {count} columns named {name!r} (data.{key_of(setting)}): rename one.")
            if not count:
                raise DataError(f"{self.path} {no_column(name, setting, schema.names)}")
            kind = schema.field(name).type
            if not _fits(setting, kind):
                key = key_of(setting)
                raise DataError(
                    f"{self.path}: the column {name!r} (data.{key}) is of type {kind}, {_REQUIRED_TYPES[key]}."
                )

    def _block(self, batch: pa.RecordBatch, before: int) -> RowBlock:
        lines = np.arange(before + 1, before + 1 + len(batch), dtype=np.int64)
        columns, too_long = {}, {}
        numbers: dict[str, np.ndarray | list[Any]] = {}
        suspicious = np.zeros(len(batch), dtype=bool)
        images: pa.Array | None = None
        members: np.ndarray | None = None
        no_image = np.zeros(len(batch), dtype=bool)
        for setting, name in self.requested.items():
            if setting == "image_key" and not _is_text(_value_type(batch.column(name).type)):
                content, columns[setting] = self._images(batch.column(name), lines)
                if content is not None:
                    no_image = bool_numpy(pc.is_null(content))
                    members = self._positions(content)
                    images = pc.cast(content, pa.large_binary()) if members is None else None
                    suspicious |= no_image
                    continue
                batch = batch.set_column(batch.schema.names.index(name), name, columns[setting])
            if is_caption(setting) and is_list(_value_type(batch.column(name).type)):
                columns[setting], faults = _text_lists(setting, batch.column(name))
                suspicious |= faults
                continue
            if is_column(setting) and not _is_text(_value_type(batch.column(name).type)):
                numbers[setting] = rows_of_numbers(batch.column(name))
                columns[setting], faults = _as_json(setting, name, numbers[setting])
                suspicious |= faults
                continue
            column, too_long[setting] = _blank_long_texts(batch.column(name), 4 * max_length(setting))
            if pa.types.is_dictionary(column.type):
                column = column.dictionary_decode()
            column = pc.cast(column, pa.large_string())
            columns[setting] = pc.fill_null(column, "") if setting == "label_key" or is_optional(setting) else column
            suspicious |= too_long[setting] | _suspicious(setting, columns[setting])
        good = np.ones(len(batch), dtype=bool)
        for row in np.flatnonzero(suspicious).tolist():
            try:
                if no_image[row]:
                    raise BadValue(*absent("image_key", self.requested["image_key"]))
                for setting, rows in too_long.items():
                    if rows[row]:
                        measure = f"more than {4 * max_length(setting):,} bytes"
                        raise BadValue(*longer_than(setting, self.requested[setting], measure))
                for setting, name in self.requested.items():
                    stored = numbers[setting][row] if setting in numbers else columns[setting][row].as_py()
                    value_of(setting, name, stored)
            except (BadValue, UnicodeDecodeError) as error:
                good[row] = False
                if isinstance(error, UnicodeDecodeError):
                    error = BadValue("not UTF-8", f"a text is not UTF-8 ({error.reason} at byte {error.start})")
                self.bad.add(int(lines[row]), error.reason, error.detail)
        extra = {name: batch.column(name) for name in self.filtered}
        found = {"lines": lines} if members is None else {"lines": lines, "members": members}
        return RowBlock(columns, found, extra or None, images).keep(good)

    def _images(self, column: pa.Array, lines: np.ndarray) -> tuple[pa.Array | None, pa.Array]:
        """Return the content of the images and their names, or None and their paths if the column has only those."""
        if _is_binary(column.type):
            return column, string_array([str(line) for line in lines.tolist()])
        content = pc.struct_field(column, "bytes")
        has_paths = "path" in _field_names(column.type)
        paths = pc.struct_field(column, "path") if has_paths else pa.nulls(len(column), pa.string())
        if self._paths_only is None:
            self._paths_only = has_paths and content.null_count == len(content) and paths.null_count < len(paths)
        if self._paths_only:
            return None, pc.cast(paths, pa.large_string())
        named = zip(paths.to_pylist(), lines.tolist(), strict=True)
        return content, string_array([path or str(line) for path, line in named])

    def _positions(self, images: pa.Array) -> np.ndarray | None:
        """Return offset and size of each image in the file, int64 [rows, 2]; None if they cannot be read from there."""
        return None


class ParquetReader(ColumnReader):
    """Reader for Parquet."""

    format = "Parquet"

    def _batches(self) -> Iterator[tuple[pa.RecordBatch, int]]:
        import pyarrow.parquet as pq  # imported here, because it takes 0.1 s that other formats do not need

        open_file = partial(pq.ParquetFile, self.path, pre_buffer=False, buffer_size=_BUFFER_BYTES)
        with open_file() as file:
            self._check_columns(file.schema_arrow)
            size, done = self.path.stat().st_size, 0
            requested = list(dict.fromkeys(self.requested.values()))
            names = list(dict.fromkeys([*requested, *self.filtered]))
            texts = [name for name in requested if _is_text(file.schema_arrow.field(name).type)]
            with open_file(read_dictionary=texts) as coded:
                for group in range(file.num_row_groups):
                    rows, repeats = _reading_strategy(coded, group, requested)
                    for batch in (coded if repeats else file).iter_batches(rows, row_groups=[group], columns=names):
                        done += len(batch)
                        yield batch, size * done // file.metadata.num_rows


class ArrowReader(ColumnReader):
    """Reader for Arrow's IPC formats, stream and file, as `datasets.save_to_disk` writes them.

    Images are read where they are in the file, unless it is compressed.
    """

    format = "Arrow"

    def _batches(self) -> Iterator[tuple[pa.RecordBatch, int]]:
        with pa.memory_map(str(self.path)) as source:
            self._content = source.read_buffer()
        size = self._content.size
        try:
            opened = pa.ipc.open_file(self._content)
            batches = (opened.get_batch(i) for i in range(opened.num_record_batches))
        except pa.ArrowInvalid:
            opened = batches = pa.ipc.open_stream(self._content)
        self._check_columns(opened.schema)
        names = list(dict.fromkeys([*self.requested.values(), *self.filtered]))
        for whole in batches:
            batch = whole.select(names)
            batch.validate(full=True)  # a damaged file may have offsets that lead out of it
            for start in range(0, len(batch), _BLOCK_ROWS):
                yield batch.slice(start, _BLOCK_ROWS), size  # mapped: it is read where it is used

    def _positions(self, images: pa.Array) -> np.ndarray | None:
        _, ends, data = images.buffers()
        if data is None or not 0 <= (start := data.address - self._content.address) < self._content.size:
            return None
        dtype = np.int64 if pa.types.is_large_binary(images.type) else np.int32
        bounds = np.frombuffer(ends, dtype)[images.offset : images.offset + len(images) + 1].astype(np.int64)
        return np.stack([start + bounds[:-1], np.diff(bounds)], axis=1)


# Images and captions in columns.


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _field_names(kind: pa.StructType) -> list[str]:
    return [kind.field(i).name for i in range(kind.num_fields)]


def _text_lists(setting: str, column: pa.Array) -> tuple[pa.LargeListArray, np.ndarray]:
    """Return lists of captions without nulls, and bool [rows], True for rows that may be bad."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    valid, texts = pc.is_valid(column), pc.list_flatten(column)
    row = pc.list_parent_indices(column)
    present = pc.is_valid(texts)
    texts, row = pc.cast(texts.filter(present), pa.large_string()), row.filter(present)
    row_of = np.array(row.to_pylist(), dtype=np.int64)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=len(column)))]).astype(np.int64)
    faults = ~bool_numpy(valid)
    faults[row_of[_suspicious(setting, texts)]] = True
    ends = pa.Array.from_buffers(pa.int64(), len(offsets), [None, pa.py_buffer(offsets)])
    return pa.LargeListArray.from_arrays(ends, texts), faults


def _reading_strategy(coded: "ParquetFile", group: int, names: list[str]) -> tuple[int, bool]:
    """Return the number of rows of a row group to read at a time, and whether to read texts as dictionaries.

    A small file can repeat a text of a megabyte many times. A dictionary stores it once. But if most texts are
    different, Arrow builds the dictionary again for every batch.

    Args:
        coded: the file, opened so that texts are read as dictionaries.
    """
    chunks = [coded.metadata.row_group(group).column(i) for i in range(coded.metadata.num_columns)]
    lists = tuple(f"{name}." for name in names)
    chunks = [chunk for chunk in chunks if chunk.path_in_schema in names or chunk.path_in_schema.startswith(lists)]
    # Reading the first row loads the dictionary, which has all texts that are repeated.
    first = next(coded.iter_batches(1, row_groups=[group], columns=names), None)
    columns = [] if first is None else [first.column(name) for name in names]
    dictionaries = [column.dictionary for column in columns if pa.types.is_dictionary(column.type)]
    longest = max((pc.max(pc.binary_length(texts)).as_py() or 0 for texts in dictionaries), default=0)
    small = all(chunk.total_uncompressed_size <= _SMALL_BYTES for chunk in chunks)
    if longest > _MAX_BYTES and small:
        return _BLOCK_ROWS, True
    rows = max(1, coded.metadata.row_group(group).num_rows)
    usual = max((chunk.total_uncompressed_size // rows for chunk in chunks), default=0)
    return min(_BLOCK_ROWS, max(1, _BLOCK_BYTES // max(1, longest, usual))), False


def _fits(setting: str, kind: pa.DataType) -> bool:
    kind = _value_type(kind)
    if setting == "filter" and (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        kind = kind.value_type
    if (text := _is_text(kind)) or (is_caption(setting) and is_list(kind) and _is_text(kind.value_type)):
        return True
    if setting == "image_key":
        is_struct = pa.types.is_struct(kind) and "bytes" in _field_names(kind)
        return _is_binary(kind) or (is_struct and _is_binary(kind.field("bytes").type))
    if is_caption(setting):
        return text
    if setting == "label_key":
        return pa.types.is_integer(kind)
    if is_column(setting):
        while is_list(kind):
            kind = kind.value_type
        return pa.types.is_integer(kind) or pa.types.is_floating(kind)
    return pa.types.is_primitive(kind) or pa.types.is_decimal(kind) or pa.types.is_null(kind)


def _value_type(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _as_json(setting: str, name: str, rows: np.ndarray | list[Any]) -> tuple[pa.LargeStringArray, np.ndarray]:
    """Return the rows of a further column as JSON, and bool [rows], True for rows that are not numbers."""
    texts, faults = [""] * len(rows), np.zeros(len(rows), dtype=bool)
    for row, value in enumerate(rows):
        try:
            texts[row] = text_of(setting, name, value)
        except BadValue:
            faults[row] = True
    return string_array(texts), faults


def _blank_long_texts(column: pa.Array, max_bytes: int) -> tuple[pa.Array, np.ndarray]:
    """Replace texts above `max_bytes` in a dictionary column by empty ones; also return their rows, bool [rows]."""
    none = np.zeros(len(column), dtype=bool)
    if not pa.types.is_dictionary(column.type):
        return column, none
    values = column.dictionary
    long = pc.fill_null(pc.greater(pc.binary_length(values), max_bytes), False)
    if not bool_numpy(long).any():
        return column, none
    rows = bool_numpy(pc.fill_null(long.take(column.indices), False))
    return pa.DictionaryArray.from_arrays(column.indices, pc.if_else(long, pa.scalar("", values.type), values)), rows


def _suspicious(setting: str, column: pa.LargeStringArray) -> np.ndarray:
    """Return bool [rows], True where a value may be bad and `text_of` must check it.

    Arrow does not check the UTF-8 of a Parquet file.
    """
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        return np.ones(len(column), dtype=bool)
    sizes = pc.binary_length(column)
    found = [pc.is_null(column), pc.greater(sizes, max_length(setting)), pc.match_substring(column, "\0")]
    if setting == "image_key":
        found.append(pc.equal(sizes, 0))
    return np.logical_or.reduce([bool_numpy(pc.fill_null(mask, True)) for mask in found])
