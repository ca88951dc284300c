"""Labeled images from any source, and the matching of their labels with class names. Does not import torch.

Classes are identified by position, never by name: `missile` and `sunglasses` are the names of two classes of ImageNet each.
"""

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clip_exp.data.image_sets import ImageSet, warn_similar_labels
from clip_exp.errors import ConfigError, DataError
from clip_exp.evaluation.sets.class_names import CLASS_SETS, class_set, imagenet_index, read_names

IMAGE_SUFFIXES = frozenset(
    (
        ".jpg",
        ".jpeg",
        ".png",
        ".webp",
        ".bmp",
        ".gif",
        ".tif",
        ".tiff",
        ".avif",
        ".heic",
        ".heif",
        ".hif",
        ".ppm",
        ".pgm",
    )
)
WNID = re.compile(r"n\d{8}$")
ACCEPTED = (
    f"labels, {', '.join(CLASS_SETS)}, objectnet, a list, a mapping of label to name, or a file of one of these (text with "
    "a name or label<tab>name per line, YAML or JSON)"
)


@dataclass(frozen=True)
class LabeledImages:
    """Images with their classes."""

    images: ImageSet
    labels: Sequence[int]  # positions in `class_names`
    class_names: list[str]  # names that are put into the prompts
    where: str  # source of the images for messages, such as a folder or table
    keys: list[str | None] = field(default_factory=list)  # folder or label of each class; None: not in the data
    unlabeled: int = 0  # number of images without a label, which are left out
    imagenet: list[list[int]] | None = None  # classes of ImageNet-1k that each class corresponds to; None: unknown
    about: dict[str, Any] = field(default_factory=dict)  # further evaluation settings about the data

    @property
    def missing(self) -> list[str]:
        """Names of the classes without images."""
        present = set(self.labels)
        return [name for position, name in enumerate(self.class_names) if position not in present]


def find_images(folder: Path, recursive: bool = True) -> list[str]:
    """Return the sorted image files in a folder. Links are followed; hidden files and folders are ignored.

    Args:
        folder: folder to search.
        recursive: search subfolders too.
    """
    found = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if recursive and not name.startswith(".")]
        found += [os.path.join(parent, name) for name in files if is_image(name)]
    return sorted(found)


def is_image(name: str) -> bool:
    """Return True if a file name is that of a visible image file."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def in_order(labels: Iterable[str]) -> list[str]:
    """Return the distinct labels in the order of the classes: by value if all are numbers, else by code point."""
    distinct = set(labels)
    return sorted(distinct, key=lambda label: (int(label), label)) if are_numbers(distinct) else sorted(distinct)


def are_numbers(labels: Iterable[str]) -> bool:
    """Return True if all labels are integers from 0."""
    return all(label.isascii() and label.isdecimal() for label in labels)


def listing(names: Sequence[str], limit: int = 5) -> str:
    """Return the first names in quotes, and the number of the others, for messages."""
    more = f" and {len(names) - limit:,} more" if len(names) > limit else ""
    return ", ".join(f"'{name}'" for name in names[:limit]) + more


@dataclass(frozen=True)
class Matched:
    """Class names, and the position of each label of the data in them."""

    position: dict[str, int]
    names: list[str]
    imagenet: list[list[int]] | None  # classes of ImageNet-1k that each name corresponds to; None: unknown

    @property
    def keys(self) -> list[str | None]:
        """Label of each name; None if it is not in the data."""
        label_at = {position: label for label, position in self.position.items()}
        return [label_at.get(position) for position in range(len(self.names))]


def match(labels: list[str], own_names: list[str], classes: Any, data: str, where: str) -> Matched:
    """Match folders or labels with class names.

    With a published list, labels are wnids, or positions in the list, from 0. Custom names are matched by label if they are a
    mapping; by name if every label is a name; by number if the labels are numbers from 0; by wnid if there are 1,000 names; and
    in order if there are as many names as labels.

    Args:
        labels: distinct labels in the order of the classes.
        own_names: class names for `classes="labels"`.
        classes: class names as in `LabeledDataConfig.classes`.
        data: description of the data, for messages.
        where: key of the data, for messages.

    Raises:
        ConfigError: names and labels do not match.
        DataError: a label is not in the published list.
    """
    warn_similar_labels(labels, data)
    if classes == "labels":
        return Matched({label: index for index, label in enumerate(labels)}, own_names, _by_wnid(labels))
    if isinstance(classes, str) and classes in CLASS_SETS:
        published, by_number = class_set(classes), are_numbers(labels)
        key_of = {label: str(int(label)) if by_number else label for label in labels}
        known = [str(number) for number in range(len(published.wnids))] if by_number else published.wnids
        position = {key: index for index, key in enumerate(known)}
        if unknown := [label for label in labels if key_of[label] not in position]:
            wnid = by_number or WNID.match(unknown[0])
            what = f"classes of {published.title}" if wnid else "WordNet ids such as n01440764"
            raise DataError(
                f"{data}: these labels are not {what}: {listing(unknown)}. Remove them, or use the labels as class names: classes=labels."
            )
        found = {label: position[key] for label, key in key_of.items()}
        return Matched(found, published.names, [[index] for index in published.indices])
    if classes == "objectnet":
        raise ConfigError(f"{where}.classes=objectnet requires the folder of ObjectNet: set {where}.root.")
    given = read_names(classes, f"{where}.classes", ACCEPTED)
    warn_similar_labels(given.values() if isinstance(given, dict) else given, f"{where}.classes")
    if isinstance(given, dict):
        if unknown := [label for label in labels if label not in given]:
            raise ConfigError(f"{where}.classes has no name for {listing(unknown)} of {data}.")
        position = {label: index for index, label in enumerate(given)}
        return Matched({label: position[label] for label in labels}, list(given.values()), _by_wnid(list(given)))
    return _match_list(labels, own_names, given, data, where)


def _by_wnid(labels: list[str]) -> list[list[int]] | None:
    index = imagenet_index()
    return [[index[label]] for label in labels] if all(label in index for label in labels) else None


def _match_list(labels: list[str], own_names: list[str], names: list[str], data: str, where: str) -> Matched:
    places = defaultdict(list)
    for index, name in enumerate(names):
        places[_same(name)].append(index)
    found = [
        places.get(_same(label)) or places.get(_same(own), []) for label, own in zip(labels, own_names, strict=True)
    ]
    if all(found):
        if ambiguous := [label for label, indices in zip(labels, found, strict=True) if len(indices) > 1]:
            raise ConfigError(
                f"{where}.classes has {listing(ambiguous)} twice, so labels cannot be matched by name: use a mapping of "
                "label to name."
            )
        return Matched({label: indices[0] for label, indices in zip(labels, found, strict=True)}, names, None)
    wnids = imagenet_index()
    if len(names) == len(wnids) and all(label in wnids for label in labels):
        return Matched({label: wnids[label] for label in labels}, names, [[index] for index in range(len(names))])
    if are_numbers(labels) and "0" in labels and int(labels[-1]) < len(names):
        return Matched({label: int(label) for label in labels}, names, None)
    if len(names) != len(labels):
        raise ConfigError(
            f"{where}.classes has {len(names)} names, {data} has {len(labels)} classes, and not all labels are "
            f"names. Give a name for each class in this order ({', '.join(labels[:3])}, …), or a mapping of label to name."
        )
    for index, (label, indices) in enumerate(zip(labels, found, strict=True)):
        if indices and index not in indices:
            raise ConfigError(
                f"{where}.classes has '{names[indices[0]]}' as name {indices[0] + 1}, but it is class {index + 1} of {data} "
                f"('{label}'): give the names in the order of the classes, or a mapping of label to name."
            )
    return Matched({label: index for index, label in enumerate(labels)}, names, _by_wnid(labels))


def _same(name: str) -> str:
    """Return a name in Unicode form NFC: macOS decomposes accents in file names."""
    return unicodedata.normalize("NFC", name)
