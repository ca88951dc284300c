"""Which rows show the same picture."""

from typing import NamedTuple

import numpy as np
import pyarrow as pa

from clip_exp.data.tables.columns import int32_numpy


class PictureGroups(NamedTuple):
    """The pictures of a table, numbered by first appearance, where some have several rows."""

    image_index: np.ndarray  # int32 [rows]: the picture of each row
    order: np.ndarray  # int32 [rows]: the rows sorted by picture, each picture's in the table's order
    offsets: np.ndarray  # int64 [pictures + 1]: where each picture's begin in `order`


def group_pictures(paths: pa.ChunkedArray, roots: np.ndarray | None = None) -> PictureGroups | None:
    """The rows by picture; None where every row has a picture of its own.

    Args:
        paths: a string per row; equal ones are the same picture.
        roots: int [rows]: paths with different numbers are different pictures; None: all paths start from one folder.
    """
    image_index = np.concatenate([int32_numpy(chunk.indices) for chunk in paths.dictionary_encode().chunks])
    if roots is not None:
        image_index = _number_by_appearance(roots.astype(np.int64) * len(paths) + image_index)
    if int(image_index.max()) + 1 == len(image_index):
        return None
    return PictureGroups(image_index, *group_by_picture(image_index))


def group_by_picture(image_index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Table rows sorted by picture, int32 [rows], and where each picture's begin, int64 [pictures + 1]."""
    order = np.argsort(image_index, kind="stable").astype(np.int32)
    return order, np.concatenate([[0], np.cumsum(np.bincount(image_index))])


def _number_by_appearance(keys: np.ndarray) -> np.ndarray:
    """int32: equal keys get equal numbers, 0 for the first key that appears, and so on."""
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int32)
    rank[np.argsort(first)] = np.arange(len(first), dtype=np.int32)
    return rank[inverse]
