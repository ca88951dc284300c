"""Which rows show the same picture."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clip_exp.data.names import normal_path
from clip_exp.data.tables.columns import int32_numpy, string_array


class PictureGroups(NamedTuple):
    """The pictures of a table, numbered by first appearance, where some have several rows."""

    image_index: np.ndarray  # int32 [rows]: the picture of each row
    order: np.ndarray  # int32 [rows]: the rows sorted by picture, each picture's in the table's order
    offsets: np.ndarray  # int64 [pictures + 1]: where each picture's begin in `order`


def group_pictures(paths: pa.ChunkedArray, rows: Sequence[int], roots: Sequence[Path]) -> PictureGroups | None:
    """Group the rows by picture; None where every row has a picture of its own.

    Args:
        paths: a string per row, as it is written; equal ones of a file, and names of the same file (`normal_path`), are the
            same picture.
        rows: of each of the table's files.
        roots: folder that each file's relative paths start from, absolute; there may be more of them than of `rows`.
    """
    # Arrow takes no names of folders that are not UTF-8; paths in tables are.
    folders = [normal_path(str(root)).encode("utf-8", "backslashreplace").decode() for root in roots]
    keys = _normal_paths(paths, rows, folders)
    image_index = np.concatenate([int32_numpy(chunk.indices) for chunk in keys.dictionary_encode().chunks])
    if int(image_index.max()) + 1 == len(image_index):
        return None
    return PictureGroups(image_index, *group_by_picture(image_index))


def group_by_picture(image_index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Table rows sorted by picture, int32 [rows], and where each picture's begin, int64 [pictures + 1]."""
    order = np.argsort(image_index, kind="stable").astype(np.int32)
    return order, np.concatenate([[0], np.cumsum(np.bincount(image_index))])


def _normal_paths(paths: pa.ChunkedArray, rows: Sequence[int], roots: Sequence[str]) -> pa.ChunkedArray:
    """A string per row that is equal for names of the same file: `normal_path`, less the folder that all roots share.

    The usual path, which is relative to the only root and has no `.` or `..`, is that already and is not copied.
    """
    shared = os.path.join(os.path.commonpath(roots), "")
    chunks: list[pa.Array] = []
    start = 0
    for count, root in zip(rows, roots, strict=False):
        below = os.path.join(root, "").removeprefix(shared)
        chunks += [_normal_chunk(chunk, shared, below) for chunk in paths.slice(start, count).chunks]
        start += count
    return pa.chunked_array(chunks, pa.large_string())


def _normal_chunk(paths: pa.LargeStringArray, shared: str, below: str) -> pa.Array:
    """Args:
    shared: folder that results are relative to where they are below it; it ends with a slash.
    below: what of a root comes after that, with a slash at its end, or nothing.
    """
    absolute = pc.starts_with(paths, "/")
    keys = pc.binary_join_element_wise(*string_array([below]), paths, *string_array([""])) if below else paths
    if pc.any(absolute).as_py():
        within = pc.utf8_slice_codeunits(paths, len(shared), None)
        keys = pc.if_else(absolute, pc.if_else(pc.starts_with(paths, shared), within, paths), keys)
    unusual = pc.or_(pc.match_substring(paths, "./"), pc.match_substring(paths, "//"))
    if pc.any(unusual).as_py():
        written = paths.filter(unusual).to_pylist()
        root = shared + below
        normal = [normal_path(path if path[0] == "/" else root + path).removeprefix(shared) for path in written]
        keys = pc.replace_with_mask(keys, unusual, string_array(normal))
    return keys
