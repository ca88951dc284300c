"""Sequences of images to evaluate on, and their class labels. Does not import torch.

The images are files, rows of a table, or items of a third-party data set such as torchvision's.
"""

import hashlib
import logging
import os
import unicodedata
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from clip_exp.data.files import (
    TOO_MANY_PIXELS,
    BadImage,
    ImageLimits,
    Stored,
    bad_image,
    image_signatures,
    normal_path,
    read_file,
)
from clip_exp.data.tables.columns import int32_numpy
from clip_exp.data.tables.reader import FileSignature
from clip_exp.data.tables.table import PairTable
from clip_exp.errors import DataError

log = logging.getLogger(__name__)


class ImageSet(Protocol):
    """Sequence of images. Must be picklable, because worker processes open the images."""

    def __len__(self) -> int: ...

    def open(self, index: int, limits: ImageLimits) -> Image.Image:
        """Return the image in its original mode, as published evaluations decode it (`data.images.open_image`).

        Raises:
            BadImage: the image cannot be used; the message is the reason.
        """
        ...

    def name(self, index: int) -> str:
        """Return a readable name: the path, or another location."""
        ...

    def stored(self, index: int) -> Stored | None:
        """Return the location of the image's bytes; None if it has none, as for an array of many images."""
        ...

    def fingerprint(self) -> str:
        """Return a hash that changes when an image changes; it is part of the cache key of the features."""
        ...


class ImageFiles:
    """Sequence of image files.

    Args:
        paths: paths of the image files.
        border: width of the border that is cropped on every side, pixels; ObjectNet's images have a red frame.
    """

    def __init__(self, paths: Sequence[str | Path], border: int = 0) -> None:
        self.paths = np.array([str(path) for path in paths])  # one block of memory, which workers share
        self.border = border

    def __len__(self) -> int:
        return len(self.paths)

    def open(self, index: int, limits: ImageLimits) -> Image.Image:
        image = _decode(read_file(self.name(index), limits), limits)
        if not self.border:
            return image
        return image.crop((self.border, self.border, image.width - self.border, image.height - self.border))

    def name(self, index: int) -> str:
        return str(self.paths[index])

    def stored(self, index: int) -> Stored:
        return Stored(self.name(index))

    def fingerprint(self) -> str:
        """Return a hash of names and signatures (`files.image_signatures`).

        Reading the whole content would take as long as encoding.
        """
        return fingerprint_of(self, f"border {self.border}")


def _decode(data: bytearray, limits: ImageLimits) -> Image.Image:
    from clip_exp.data.images import decode  # imports torch, which is not needed to list images

    return decode(data, limits)


class TableImages:
    """Sequence of the images of a table, in files or shards.

    Args:
        table: table with the paths of the images.
        rows: one row for each image.
        outside_root: see `ImageLimits`.
    """

    def __init__(self, table: PairTable, rows: Sequence[int], outside_root: bool = False) -> None:
        self.table, self.rows, self.outside_root = table, np.array(rows, dtype=np.int64), outside_root

    def __len__(self) -> int:
        return len(self.rows)

    def open(self, index: int, limits: ImageLimits) -> Image.Image:
        limits = replace(limits, outside_root=self.outside_root)
        return _decode(self.table.read_image(int(self.rows[index]), limits), limits)

    def name(self, index: int) -> str:
        return self.table.image_path(int(self.rows[index]))

    def stored(self, index: int) -> Stored:
        row = int(self.rows[index])
        if self.table.members is None:
            return Stored(self.table.image_path(row))
        offset, size = self.table.members[row].tolist()
        return Stored(str(self.table.container(row)), offset, size)

    def fingerprint(self) -> str:
        """Return a hash like that of `ImageFiles`; for shards it includes the offsets of the images."""
        return fingerprint_of(self, "border 0")


@dataclass(frozen=True)
class TorchvisionImages:
    """Sequence of the images of a torchvision data set, or of any other data set whose items start with an image."""

    dataset: Any  # `dataset[i][0]` is a PIL image
    title: str  # name and split of the data set, such as CIFAR10/test
    root: Path  # absolute folder that was passed to the data set

    def __len__(self) -> int:
        return len(self.dataset)

    def open(self, index: int, limits: ImageLimits) -> Image.Image:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                image = self.dataset[index][0]
                image.load()
            except Exception as error:  # a third-party class may raise anything for a damaged file
                raise bad_image(error) from error
        if image.width * image.height > limits.max_pixels:
            raise BadImage(
                f"{TOO_MANY_PIXELS}: {image.width} x {image.height} pixels, more than max_image_pixels={limits.max_pixels}"
            )
        return image

    def name(self, index: int) -> str:
        return f"{self.title}/{index}"

    def stored(self, index: int) -> Stored | None:
        """Return the image's file, if the data set has a list of paths or of tuples that start with a path."""
        for listed in vars(self.dataset).values():
            if isinstance(listed, list) and len(listed) == len(self):
                item = listed[index]
                path = item[0] if isinstance(item, tuple) and item else item
                if isinstance(path, str | Path) and os.path.isabs(path) and os.path.isfile(path):
                    return Stored(str(path))
        return None

    def fingerprint(self) -> str:
        """Return a hash of the name and the length of the data set, and of the names and signatures of its files."""
        # Only files in the folders that the data set names, if it does: `root` may contain many data sets.
        named = [getattr(self.dataset, name, None) for name in ("base_folder", "raw_folder", "filename")]
        named += [
            value for value in vars(self.dataset).values() if isinstance(value, str | Path) and os.path.isabs(value)
        ]
        paths = {self.root / value for value in named if isinstance(value, str | Path)}
        own = {path for path in paths if self.root in path.parents and path.exists()} or {self.root}
        found = {str(path) for path in own if path.is_file()}
        for folder in own:
            found |= {os.path.join(parent, name) for parent, _, names in os.walk(folder) for name in names}
        digest = hashlib.sha256(f"{self.title}\t{len(self)}\n".encode())
        for file in sorted(found):
            digest.update(f"{file}\t{tuple(FileSignature.of(Path(file), len(found)))}\n".encode())
        return digest.hexdigest()


def fingerprint_of(images: ImageFiles | TableImages, about: str) -> str:
    """Return a hash that changes when the location or the content of an image changes.

    Args:
        about: further text that the hash depends on.
    """
    places = [images.stored(index) for index in range(len(images))]
    digest = hashlib.sha256(f"{about}\n".encode())
    for place, signature in zip(places, image_signatures(places), strict=True):
        line = f"{normal_path(place.file)}\t{place.offset}\t{tuple(signature)}\n"
        digest.update(line.encode(errors="surrogateescape"))
    return digest.hexdigest()


# Class labels.

_SHOWN = 3  # groups of labels shown in a warning


def label_of_images(table: PairTable) -> list[str]:
    """Return the label of each image of a table that was read with labels; '' for an image without a label.

    Raises: DataError if two rows give an image different labels.
    """
    assert table.labels is not None
    encoded = table.labels.dictionary_encode()
    names: list[str] = encoded.chunk(0).dictionary.to_pylist()
    code = np.concatenate([int32_numpy(chunk.indices) for chunk in encoded.chunks])
    images = table.image_index()
    rows = np.flatnonzero(code != names.index("")) if "" in names else np.arange(len(code))
    first = np.full(table.images, -1, dtype=np.int64)  # first row with a label, for each image
    first[images[rows[::-1]]] = rows[::-1]
    other = rows[code[rows] != code[first[images[rows]]]]
    if len(other):
        row, before = int(other[0]), int(first[images[other[0]]])
        raise DataError(
            f"{table.where(row)}: the label of {table.path(row)} is '{table.label(row)}' here, but '{table.label(before)}' in "
            f"{table.where(before)}. Give each image one label."
        )
    return ["" if row < 0 else names[code[row]] for row in first.tolist()]


def warn_similar_labels(labels: Iterable[str], where: str) -> None:
    """Warn about labels that differ only in case, blanks or Unicode form; they remain separate classes.

    Args:
        where: table, folder or key with the labels, for the message.
    """
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for label in dict.fromkeys(labels):
        groups["".join(unicodedata.normalize("NFKC", label).casefold().split())].append(label)
    alike = [group for group in groups.values() if len(group) > 1]
    if alike:
        shown = "; ".join(" and ".join(map(repr, group)) for group in alike[:_SHOWN]) + " …" * (len(alike) > _SHOWN)
        log.warning(
            "%s: %d labels differ only in case or blanks and count as separate classes: %s. Write each class in one way.",
            where,
            sum(map(len, alike)),
            shown,
        )
