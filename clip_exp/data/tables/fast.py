"""Blocks of delimited text without a fault, cut and parsed at once. What comes out is what `records` would read."""

from typing import NamedTuple

import numpy as np
import pyarrow as pa
from pyarrow import csv as arrow_csv

from clip_exp.data.tables.columns import string_buffers
from clip_exp.data.tables.layouts import Layout
from clip_exp.data.tables.reader import MAX_CAPTION
from clip_exp.data.tables.records import MAX_FIELD

_QUOTE, _NEWLINE, _RETURN = b'"\n\r'


class FastRows(NamedTuple):
    """The records at the start of a block."""

    columns: dict[int, pa.LargeStringArray]  # by index of the field
    lines: np.ndarray  # int64: line that each record starts in, 0 for the block's first
    size: int  # bytes
    line_count: int


class _Cut(NamedTuple):
    """Where the records of a block end."""

    newlines: np.ndarray  # all of them, up to the last record's end
    ends: np.ndarray  # which of them end records: indices of `newlines`
    quoting: bool  # whether quotes mean anything


def parse_block(block: bytes, layout: Layout) -> FastRows | None:
    """The whole records of a block that starts with one; None if anything is unusual, and the strict reader must look.

    Args:
        block: UTF-8.
        layout: of the table.
    """
    cut = _cut(block, layout.separator)
    if cut is None:
        return None
    ends = cut.newlines[cut.ends]
    lengths = np.diff(ends, prepend=-1)
    size = int(ends[-1]) + 1
    text = memoryview(block)[:size]
    if lengths.max() > MAX_FIELD or not _is_utf8(text):
        return None
    columns = _fields(text, layout, cut.quoting)
    if columns is None or not _are_good(columns, len(ends), layout):
        return None
    lines = np.concatenate([[0], cut.ends[:-1] + 1])
    return FastRows(columns, lines, size, len(cut.newlines))


def _cut(block: bytes, separator: str) -> _Cut | None:
    if not separator.isascii() or b"\0" in block or block.startswith(b"\xef\xbb\xbf"):  # Arrow drops a mark anywhere
        return None
    data = np.frombuffer(block, dtype=np.uint8)
    newlines = np.flatnonzero(data == _NEWLINE)
    if not len(newlines) or (b"\r" in block and not _only_before(data, _RETURN, _NEWLINE)):
        return None
    if b'"' not in block:
        return _Cut(newlines, np.arange(len(newlines)), False)
    quotes = np.flatnonzero(data == _QUOTE)
    starts_field = _follows(data, quotes, separator)
    if not starts_field.any():
        return _Cut(newlines, np.arange(len(newlines)), False)
    ends = np.flatnonzero(np.searchsorted(quotes, newlines) % 2 == 0)
    if not len(ends):
        return None
    newlines = newlines[: ends[-1] + 1]
    inside = quotes < newlines[-1]
    good = _are_balanced(data, quotes[inside], starts_field[inside], separator)
    return _Cut(newlines, ends, True) if good else None


def _follows(data: np.ndarray, places: np.ndarray, separator: str) -> np.ndarray:
    """Which places are at the start of a field, outside quotes."""
    before = data[places - 1]  # of the first byte: the last, whatever it is
    return (before == ord(separator)) | (before == _NEWLINE) | (places == 0)


def _are_balanced(data: np.ndarray, quotes: np.ndarray, starts_field: np.ndarray, separator: str) -> bool:
    """Whether each quote opens a field at its start, closes it at its end, or is one of two in a quoted field."""
    doubled = np.diff(quotes) == 1  # a quote and the next
    after = data[quotes[1::2] + 1]
    ends_field = (after == ord(separator)) | (after == _NEWLINE) | (after == _RETURN)
    doubled_before = np.concatenate([[False], doubled[1::2]])
    doubled_after = np.concatenate([doubled[1::2], [False]])
    return bool((starts_field[0::2] | doubled_before).all() and (ends_field | doubled_after).all())


def _only_before(data: np.ndarray, first: int, second: int) -> bool:
    """Whether every `first` has `second` after it."""
    places = np.flatnonzero(data == first) + 1
    return bool(places[-1] < len(data) and (data[places] == second).all())


def _is_utf8(text: memoryview) -> bool:
    try:
        str(text, "utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _fields(text: memoryview, layout: Layout, quoting: bool) -> dict[int, pa.LargeStringArray] | None:
    names = {index: str(index) for index in layout.wanted}
    try:
        table = arrow_csv.read_csv(
            pa.BufferReader(pa.py_buffer(text)),
            arrow_csv.ReadOptions(
                use_threads=False, block_size=len(text) + 1, column_names=[str(index) for index in range(layout.width)]
            ),
            arrow_csv.ParseOptions(
                delimiter=layout.separator, quote_char='"' if quoting else False, newlines_in_values=quoting
            ),
            arrow_csv.ConvertOptions(
                check_utf8=False,  # the whole block was
                column_types=dict.fromkeys(names.values(), pa.large_string()),
                include_columns=list(names.values()),
                strings_can_be_null=False,
            ),
        )
    except pa.ArrowInvalid:  # a wrong number of fields
        return None
    return {index: table.column(name).combine_chunks() for index, name in names.items()}


def _are_good(columns: dict[int, pa.LargeStringArray], count: int, layout: Layout) -> bool:
    """Whether there are as many records as lines say, none of which `records` might object to."""
    if any(len(array) != count or array.null_count for array in columns.values()):
        return False
    for setting, index in layout.indices.items():
        starts, data = string_buffers(columns[index])
        lengths = np.diff(starts)
        if lengths.max() > MAX_CAPTION or (setting == "image_key" and not lengths.all()):
            return False
        # The only field of a line, if blank, makes a blank line.
        if layout.width == 1 and (data[starts[:-1]] <= ord(" ")).any() | (data[starts[:-1]] > ord("~")).any():
            return False
    return True
