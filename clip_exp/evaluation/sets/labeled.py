"""Labelled pictures, whatever they come from, and how they are found below a folder. No torch."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clip_exp.data.pictures import Pictures

IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"))


@dataclass(frozen=True)
class LabeledImages:
    """Pictures and the class that each belongs to."""

    pictures: Pictures
    labels: Sequence[int]  # positions in `class_names`
    class_names: list[str]  # what pictures are scored against
    where: str  # for people: the folder, the table, or what else it is
    keys: list[str | None] = field(default_factory=list)  # folder or label of each class; None: the data lacks it
    unlabeled: int = 0  # pictures of the table that have no label, and are left out
    imagenet: list[list[int]] | None = (
        None  # of each class the classes of ImageNet-1k that it stands for, where it does
    )
    about: dict[str, Any] = field(default_factory=dict)  # what else a protocol says of the data

    @property
    def missing(self) -> list[str]:
        """Names that pictures are scored against though none belongs to them."""
        present = set(self.labels)
        return [name for position, name in enumerate(self.class_names) if position not in present]


def find_pictures(folder: Path, below: bool = True) -> list[str]:
    """Picture files of a folder, sorted; links are followed, hidden files and folders are not.

    Args:
        below: those in its folders too.
    """
    found = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if below and not name.startswith(".")]
        found += [os.path.join(parent, name) for name in files if is_picture(name)]
    return sorted(found)


def is_picture(name: str) -> bool:
    """Whether a file's name is a picture's."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def in_order(labels: Iterable[str]) -> list[str]:
    """Distinct labels in the order of their classes: numbers by value, others by code point."""
    distinct = set(labels)
    return sorted(distinct, key=lambda label: (int(label), label)) if are_numbers(distinct) else sorted(distinct)


def are_numbers(labels: Iterable[str]) -> bool:
    """Whether all labels are written as whole numbers from 0."""
    return all(label.isascii() and label.isdecimal() for label in labels)


def listing(names: Sequence[str], limit: int = 5) -> str:
    """For messages: the first names in quotes, and how many more there are."""
    more = f" and {len(names) - limit:,} more" if len(names) > limit else ""
    return ", ".join(f"'{name}'" for name in names[:limit]) + more
