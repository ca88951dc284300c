"""Columns as Arrow arrays, made and read through their buffers: `pyarrow.array` and `to_numpy` import pandas where it is installed."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


def string_array(values: Sequence[str]) -> pa.LargeStringArray:
    """Strings as one block of UTF-8 and its offsets."""
    encoded = [value.encode("utf-8") for value in values]
    offsets = np.zeros(len(encoded) + 1, dtype=np.int64)
    np.cumsum([len(value) for value in encoded], out=offsets[1:])
    return pa.LargeStringArray.from_buffers(len(encoded), pa.py_buffer(offsets), pa.py_buffer(b"".join(encoded)))


def string_buffers(array: pa.LargeStringArray) -> tuple[np.ndarray, np.ndarray]:
    """Where each string begins and the last ends, int64 [rows + 1], in the UTF-8 of all, uint8; both share the array's memory."""
    _, offsets, data = array.buffers()
    ends = np.frombuffer(offsets, dtype=np.int64)[array.offset : array.offset + len(array) + 1]
    return ends, np.frombuffer(b"" if data is None else data, dtype=np.uint8)


def bool_array(values: np.ndarray) -> pa.BooleanArray:
    """Truth values without nulls, from bool [rows]."""
    bits = np.packbits(values, bitorder="little")
    return pa.Array.from_buffers(pa.bool_(), len(values), [None, pa.py_buffer(bits)])


def bool_numpy(array: pa.BooleanArray) -> np.ndarray:
    """The truth values of an array without nulls, bool, in memory of its own."""
    values = pc.cast(array, pa.uint8())
    return np.frombuffer(values.buffers()[1], dtype=np.uint8)[values.offset :][: len(values)].astype(bool)


def int32_numpy(array: pa.Int32Array) -> np.ndarray:
    """The values of an array without nulls, int32, sharing its memory."""
    return np.frombuffer(array.buffers()[1], dtype=np.int32)[array.offset : array.offset + len(array)]


# Characters that show nothing, at the ends of labels and in captions that are empty to everybody who looks at them.

# What `str.isspace` is true of, the no-break and the ideographic space among them, and what has no width or no ink.
BLANKS = (
    "\t\n\v\f\r\x1c\x1d\x1e\x1f \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u2028\u2029"
    "\u202f\u205f\u3000"
    "\xad\u180e\u200b\u200c\u200d\u200e\u200f\u2060\u2800\u3164\ufeff"
)
_STARTS_BLANK = np.isin(np.arange(256), [blank.encode()[0] for blank in BLANKS])  # by a string's first byte


def trimmed(column: pa.LargeStringArray) -> pa.LargeStringArray:
    """Return the strings without the blanks around them."""
    return pc.utf8_trim(column, BLANKS)


def count_blank(column: pa.LargeStringArray) -> int:
    """Return how many strings are empty or hold nothing but blanks. Those that begin with something else need not be searched."""
    starts, data = string_buffers(column)
    if not len(data):
        return len(column)
    first = data[np.minimum(starts[:-1], len(data) - 1)]
    candidates = column.filter(bool_array(_STARTS_BLANK[first] | (np.diff(starts) == 0)))
    starts, _ = string_buffers(trimmed(candidates))
    return len(candidates) - int(np.count_nonzero(np.diff(starts)))
