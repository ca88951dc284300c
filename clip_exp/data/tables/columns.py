"""Conversion between Arrow arrays and NumPy or Python values through buffers.

`pyarrow.array` and `to_numpy` would import pandas.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


def string_array(values: Sequence[str]) -> pa.LargeStringArray:
    """Convert strings to an Arrow array: one block of UTF-8 and its offsets."""
    encoded = [value.encode("utf-8") for value in values]
    offsets = np.zeros(len(encoded) + 1, dtype=np.int64)
    np.cumsum([len(value) for value in encoded], out=offsets[1:])
    return pa.LargeStringArray.from_buffers(len(encoded), pa.py_buffer(offsets), pa.py_buffer(b"".join(encoded)))


def string_buffers(array: pa.LargeStringArray) -> tuple[np.ndarray, np.ndarray]:
    """Return the offsets of the strings, int64 [rows + 1], and the UTF-8 of all strings, uint8.

    Both share the array's memory.
    """
    _, offsets, data = array.buffers()
    ends = np.frombuffer(offsets, dtype=np.int64)[array.offset : array.offset + len(array) + 1]
    return ends, np.frombuffer(b"" if data is None else data, dtype=np.uint8)


def bool_array(values: np.ndarray) -> pa.BooleanArray:
    """Convert bool [rows] to an Arrow array without nulls."""
    bits = np.packbits(values, bitorder="little")
    return pa.Array.from_buffers(pa.bool_(), len(values), [None, pa.py_buffer(bits)])


def bool_numpy(array: pa.BooleanArray) -> np.ndarray:
    """Copy an array without nulls to NumPy, bool [rows]."""
    values = pc.cast(array, pa.uint8())
    return np.frombuffer(values.buffers()[1], dtype=np.uint8)[values.offset :][: len(values)].astype(bool)


def int32_numpy(array: pa.Int32Array) -> np.ndarray:
    """Return the values of an array without nulls as int32 [rows], sharing its memory."""
    return np.frombuffer(array.buffers()[1], dtype=np.int32)[array.offset : array.offset + len(array)]


def is_list(kind: pa.DataType) -> bool:
    """Return True for a type of lists, of equal or different lengths."""
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def rows_of_numbers(array: pa.Array) -> np.ndarray | list[Any]:
    """Return each row of a column of numbers or lists of numbers, which may be nested.

    A number is a float64, and a list is an array of them. A missing number is NaN, also in a list, and a missing list
    is None.
    """
    if not is_list(array.type):
        numbers = pc.fill_null(pc.cast(array, pa.float64(), safe=False), float("nan"))
        return np.frombuffer(numbers.buffers()[1], dtype=np.float64)[numbers.offset :][: len(numbers)]
    lengths = pc.fill_null(pc.cast(pc.list_value_length(array), pa.int32()), 0)
    ends = np.cumsum(int32_numpy(lengths), dtype=np.int64)
    inner = rows_of_numbers(pc.list_flatten(array))
    rows = [inner[start:end] for start, end in zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True)]
    return [row if valid else None for row, valid in zip(rows, bool_numpy(pc.is_valid(array)), strict=True)]


# Invisible characters, which are trimmed from labels and make a caption blank.

# Characters for which `str.isspace` is true, such as the no-break and the ideographic space, and characters without
# width or ink.
BLANKS = (
    "\t\n\v\f\r\x1c\x1d\x1e\x1f \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u2028\u2029"
    "\u202f\u205f\u3000"
    "\xad\u180e\u200b\u200c\u200d\u200e\u200f\u2060\u2800\u3164\ufeff"
)
_STARTS_BLANK = np.isin(
    np.arange(256), [blank.encode()[0] for blank in BLANKS]
)  # indexed by the first byte of a string


def trimmed(column: pa.LargeStringArray) -> pa.LargeStringArray:
    """Return the strings without leading and trailing blanks."""
    return pc.utf8_trim(column, BLANKS)


def count_blank(column: pa.LargeStringArray) -> int:
    """Return the number of strings that are empty or consist of blanks."""
    # Trim only the strings whose first byte may start a blank.
    starts, data = string_buffers(column)
    if not len(data):
        return len(column)
    first = data[np.minimum(starts[:-1], len(data) - 1)]
    candidates = column.filter(bool_array(_STARTS_BLANK[first] | (np.diff(starts) == 0)))
    starts, _ = string_buffers(trimmed(candidates))
    return len(candidates) - int(np.count_nonzero(np.diff(starts)))
