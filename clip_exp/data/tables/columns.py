"""Columns as Arrow arrays, made and read through their buffers: `pyarrow.array` and `to_numpy` import pandas where it is installed."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa


def string_array(values: Sequence[str]) -> pa.LargeStringArray:
    """Strings as one block of UTF-8 and its offsets."""
    encoded = [value.encode("utf-8") for value in values]
    offsets = np.zeros(len(encoded) + 1, dtype=np.int64)
    np.cumsum([len(value) for value in encoded], out=offsets[1:])
    return pa.LargeStringArray.from_buffers(len(encoded), pa.py_buffer(offsets), pa.py_buffer(b"".join(encoded)))


def int32_array(values: Sequence[int]) -> pa.Int32Array:
    """Integers without nulls."""
    data = np.asarray(values, dtype=np.int32)
    return pa.Array.from_buffers(pa.int32(), len(data), [None, pa.py_buffer(data)])


def int32_numpy(array: pa.Int32Array) -> np.ndarray:
    """The values of an array without nulls, int32, sharing its memory."""
    return np.frombuffer(array.buffers()[1], dtype=np.int32)[array.offset : array.offset + len(array)]


def number_by_appearance(keys: np.ndarray) -> np.ndarray:
    """int32: equal keys get equal numbers, 0 for the first key that appears, and so on."""
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int32)
    rank[np.argsort(first)] = np.arange(len(first), dtype=np.int32)
    return rank[inverse]
