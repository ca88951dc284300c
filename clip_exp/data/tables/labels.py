"""The class of each image of a table, and labels that may be meant to be one class."""

import logging
import unicodedata
from collections import defaultdict
from collections.abc import Iterable

import numpy as np

from clip_exp.data.tables.columns import int32_numpy
from clip_exp.data.tables.table import PairTable
from clip_exp.errors import DataError

log = logging.getLogger(__name__)

_SHOWN = 3  # groups of labels in a warning


def label_of_images(table: PairTable) -> list[str]:
    """Return the label of each image of a table that was read with labels; '' for an image that none of its rows labels.

    Raises: DataError where two rows give an image different labels.
    """
    assert table.labels is not None
    encoded = table.labels.dictionary_encode()
    names: list[str] = encoded.chunk(0).dictionary.to_pylist()
    code = np.concatenate([int32_numpy(chunk.indices) for chunk in encoded.chunks])
    pictures = table.image_index()
    rows = np.flatnonzero(code != names.index("")) if "" in names else np.arange(len(code))
    first = np.full(table.pictures, -1, dtype=np.int64)  # row that labels each image
    first[pictures[rows[::-1]]] = rows[::-1]
    other = rows[code[rows] != code[first[pictures[rows]]]]
    if len(other):
        row, before = int(other[0]), int(first[pictures[other[0]]])
        raise DataError(
            f"{table.where(row)}: {table.path(row)} is '{table.label(row)}' here and '{table.label(before)}' before "
            f"({table.where(before)}); give one label."
        )
    return ["" if row < 0 else names[code[row]] for row in first.tolist()]


def warn_alike(labels: Iterable[str], where: str) -> None:
    """Warn of labels that differ only in case, blanks or the form of their letters: they stay classes of their own.

    Args:
        where: the table, folder or key that they come from, for the message.
    """
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for label in dict.fromkeys(labels):
        groups["".join(unicodedata.normalize("NFKC", label).casefold().split())].append(label)
    alike = [group for group in groups.values() if len(group) > 1]
    if alike:
        shown = "; ".join(" and ".join(map(repr, group)) for group in alike[:_SHOWN]) + " …" * (len(alike) > _SHOWN)
        log.warning(
            "%s: %d labels differ only in case or blanks, but are classes of their own: %s. Write each class in one way.",
            where,
            sum(map(len, alike)),
            shown,
        )
