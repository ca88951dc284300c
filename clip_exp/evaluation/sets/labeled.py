"""Labelled images, whatever they come from: found below a folder, their labels in order and matched with the names that they are scored against. No torch.

A name is a position, never a key: `missile` and `sunglasses` are each the name of two classes of ImageNet.
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

IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"))
WNID = re.compile(r"n\d{8}$")
ACCEPTED = (
    f"labels, {', '.join(CLASS_SETS)}, objectnet, a list, a mapping of label to name, or a file of one of these (text with "
    "a name or label<tab>name per line, YAML or JSON)"
)


@dataclass(frozen=True)
class LabeledImages:
    """Images and the class that each belongs to."""

    images: ImageSet
    labels: Sequence[int]  # positions in `class_names`
    class_names: list[str]  # what images are scored against
    where: str  # for people: the folder, the table, or what else it is
    keys: list[str | None] = field(default_factory=list)  # folder or label of each class; None: the data lacks it
    unlabeled: int = 0  # images of the table that have no label, and are left out
    imagenet: list[list[int]] | None = (
        None  # of each class the classes of ImageNet-1k that it stands for, where it does
    )
    about: dict[str, Any] = field(default_factory=dict)  # what else a protocol says of the data

    @property
    def missing(self) -> list[str]:
        """Names that images are scored against though none belongs to them."""
        present = set(self.labels)
        return [name for position, name in enumerate(self.class_names) if position not in present]


def find_images(folder: Path, below: bool = True) -> list[str]:
    """Image files of a folder, sorted; links are followed, hidden files and folders are not."""
    found = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if below and not name.startswith(".")]
        found += [os.path.join(parent, name) for name in files if is_image(name)]
    return sorted(found)


def is_image(name: str) -> bool:
    """Whether a file's name is an image's."""
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


@dataclass(frozen=True)
class Matched:
    """Where each label of the data is among the names."""

    position: dict[str, int]
    names: list[str]
    imagenet: list[list[int]] | None  # of each name the classes of ImageNet-1k that it stands for, where that is known

    @property
    def keys(self) -> list[str | None]:
        """The label of each name; None where the data lack it."""
        label_at = {position: label for label, position in self.position.items()}
        return [label_at.get(position) for position in range(len(self.names))]


def match(labels: list[str], own_names: list[str], classes: Any, data: str, where: str) -> Matched:
    """The position of each folder or label among the names to score against, and those names.

    Under a published list labels are wnids, or numbers that count its classes from 0, in the order of wnids. The user's
    names are matched by a mapping where they are one; by name where every label is among them; by number where the labels
    are numbers from 0; by wnid where there are 1,000 of them; and in order where there are as many names as labels.

    Args:
        labels: distinct, in the order of the classes.
        own_names: what they are called where `classes` is `labels`.
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
            what = f"no class of {published.title}" if wnid else "no WordNet id such as n01440764"
            raise DataError(
                f"{data}: {listing(unknown)} {'is' if len(unknown) == 1 else 'are'} {what}. Remove it, or score against the data's own names: classes=labels."
            )
        found = {label: position[key] for label, key in key_of.items()}
        return Matched(found, published.names, [[index] for index in published.indices])
    if classes == "objectnet":
        raise ConfigError(f"{where}.classes=objectnet is for ObjectNet's own folder: give {where}.root.")
    given = read_names(classes, f"{where}.classes", ACCEPTED)
    warn_similar_labels(given.values() if isinstance(given, dict) else given, f"{where}.classes")
    if isinstance(given, dict):
        if unknown := [label for label in labels if label not in given]:
            raise ConfigError(f"{where}.classes names nothing for {listing(unknown)} of {data}.")
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
                f"{where}.classes has {listing(ambiguous)} twice, so labels cannot be matched by name: give a mapping of "
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
            f"{where}.classes has {len(names)} names, {data} has {len(labels)} classes, and not all of these are among "
            f"those. Give a name for each in this order ({', '.join(labels[:3])}, …), or a mapping of label to name."
        )
    for index, (label, indices) in enumerate(zip(labels, found, strict=True)):
        if indices and index not in indices:
            raise ConfigError(
                f"{where}.classes has '{names[indices[0]]}' as name {indices[0] + 1}, but it is class {index + 1} of {data} "
                f"('{label}'): give the names in the order of the classes, or a mapping of label to name."
            )
    return Matched({label: index for index, label in enumerate(labels)}, names, _by_wnid(labels))


def _same(name: str) -> str:
    """One form of a name's letters: macOS decomposes accents in the names of files."""
    return unicodedata.normalize("NFC", name)
