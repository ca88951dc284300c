"""Images to evaluate on, by position, and their classes. No torch.

They are files, rows of a table, or what a library keeps in a form of its own.
"""

import hashlib
import logging
import os
import unicodedata
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from clip_exp.data.files import (
    MAX_EVALUATED_BYTES,
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
    """A sequence of images; picklable, since worker processes open them."""

    def __len__(self) -> int: ...

    def open(self, index: int, max_pixels: int) -> Image.Image:
        """The image in its own mode, as the published protocol sees it (`data.images.open_image`).

        Raises:
            BadImage: it cannot be used; the message is the reason.
        """
        ...

    def name(self, index: int) -> str:
        """For people: the path, or where else it is."""
        ...

    def stored(self, index: int) -> Stored | None:
        """Return where the image's bytes are; None where it has none of its own, as in an array of many."""
        ...

    def fingerprint(self) -> str:
        """A hash that changes when an image does; what is cached about the images is filed under it."""
        ...


class ImageFiles:
    """Images in files.

    Args:
        paths: of the files.
        border: pixels that are cut off on every side; ObjectNet's images have a red frame.
    """

    def __init__(self, paths: Sequence[str | Path], border: int = 0) -> None:
        self.paths = np.array([str(path) for path in paths])  # one block of memory that workers share
        self.border = border

    def __len__(self) -> int:
        return len(self.paths)

    def open(self, index: int, max_pixels: int) -> Image.Image:
        limits = ImageLimits(max_pixels, max_bytes=MAX_EVALUATED_BYTES)
        image = _decode(read_file(self.name(index), limits), limits)
        if not self.border:
            return image
        return image.crop((self.border, self.border, image.width - self.border, image.height - self.border))

    def name(self, index: int) -> str:
        return str(self.paths[index])

    def stored(self, index: int) -> Stored:
        return Stored(self.name(index))

    def fingerprint(self) -> str:
        """Of names, sizes, times of change and samples of the content (`files.image_signatures`): reading all of it takes as long as encoding."""
        return fingerprint_of(self, f"border {self.border}")


def _decode(data: bytearray, limits: ImageLimits) -> Image.Image:
    from clip_exp.data.images import decode  # and torch, which finding images does without

    return decode(data, limits)


class TableImages:
    """Images of a table's rows, in files anywhere or in shards.

    Args:
        table: of images.
        rows: one for each image.
        outside_root: see `ImageLimits`.
    """

    def __init__(self, table: PairTable, rows: Sequence[int], outside_root: bool = False) -> None:
        self.table, self.rows, self.outside_root = table, np.array(rows, dtype=np.int64), outside_root

    def __len__(self) -> int:
        return len(self.rows)

    def open(self, index: int, max_pixels: int) -> Image.Image:
        limits = ImageLimits(max_pixels, max_bytes=MAX_EVALUATED_BYTES, outside_root=self.outside_root)
        return _decode(self.table.read_image(int(self.rows[index]), limits), limits)

    def name(self, index: int) -> str:
        return self.table.image_path(int(self.rows[index]))

    def stored(self, index: int) -> Stored:
        row = int(self.rows[index])
        if self.table.members is None:
            return Stored(self.table.image_path(row))
        offset, size = self.table.members[row].tolist()
        return Stored(str(self.table.part(row).path), offset, size)

    def fingerprint(self) -> str:
        """As `ImageFiles` has it; of shards, with the images' places in them."""
        return fingerprint_of(self, "border 0")


@dataclass(frozen=True)
class TorchvisionImages:
    """The images of a data set of torchvision, or of anything whose items begin with an image."""

    dataset: Any  # `dataset[i][0]` is a PIL image
    title: str  # of the set and its part, as CIFAR10/test
    root: Path  # the folder that the set was given, absolute

    def __len__(self) -> int:
        return len(self.dataset)

    def open(self, index: int, max_pixels: int) -> Image.Image:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                image = self.dataset[index][0]
                image.load()
            except Exception as error:  # whatever this class meets in a damaged file
                raise bad_image(error) from error
        if image.width * image.height > max_pixels:
            raise BadImage(
                f"{TOO_MANY_PIXELS}: {image.width} x {image.height} pixels, more than max_image_pixels={max_pixels}"
            )
        return image

    def name(self, index: int) -> str:
        return f"{self.title}/{index}"

    def stored(self, index: int) -> Stored | None:
        """Return the image's file where the set has a list of them, whatever its name: of paths, or of tuples that begin with one."""
        for listed in vars(self.dataset).values():
            if isinstance(listed, list) and len(listed) == len(self):
                item = listed[index]
                path = item[0] if isinstance(item, tuple) and item else item
                if isinstance(path, str | Path) and os.path.isabs(path) and os.path.isfile(path):
                    return Stored(str(path))
        return None

    def fingerprint(self) -> str:
        """Of the set's name and length, and of names, sizes, times of change and samples of the content of its files."""
        # Files below the set's own folders where it names them: `root` may hold many sets.
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
    """Return a hash that changes when an image is in another place, or what is there.

    Args:
        about: what else it depends on.
    """
    places = [images.stored(index) for index in range(len(images))]
    digest = hashlib.sha256(f"{about}\n".encode())
    for place, signature in zip(places, image_signatures(places), strict=True):
        line = f"{normal_path(place.file)}\t{place.offset}\t{tuple(signature)}\n"
        digest.update(line.encode(errors="surrogateescape"))
    return digest.hexdigest()


# Classes: the label of each image of a table, and labels that may be meant to be one class.

_SHOWN = 3  # groups of labels in a warning


def label_of_images(table: PairTable) -> list[str]:
    """Return the label of each image of a table that was read with labels; '' for an image that none of its rows labels.

    Raises: DataError where two rows give an image different labels.
    """
    assert table.labels is not None
    encoded = table.labels.dictionary_encode()
    names: list[str] = encoded.chunk(0).dictionary.to_pylist()
    code = np.concatenate([int32_numpy(chunk.indices) for chunk in encoded.chunks])
    images = table.image_index()
    rows = np.flatnonzero(code != names.index("")) if "" in names else np.arange(len(code))
    first = np.full(table.images, -1, dtype=np.int64)  # row that labels each image
    first[images[rows[::-1]]] = rows[::-1]
    other = rows[code[rows] != code[first[images[rows]]]]
    if len(other):
        row, before = int(other[0]), int(first[images[other[0]]])
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
