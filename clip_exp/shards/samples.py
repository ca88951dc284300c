"""Samples of a data set in the order of its tables: an image with one or all of its captions. Does not import torch."""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

from PIL import Image

from clip_exp.config.data import Captions
from clip_exp.data.files import JPEGS, NOT_ALLOWED, BadImage, ImageLimits, open_image_bytes
from clip_exp.data.image_sets import TableImages
from clip_exp.data.tables.features import Shape
from clip_exp.data.tables.reader import IMAGES
from clip_exp.data.tables.table import PairTable


class Sample(NamedTuple):
    """Image with its captions."""

    key: str
    extension: str  # of the image's format, as readers of shards know it
    image: bytearray
    captions: list[str]
    columns: dict[str, Any]  # further columns by name: a text, a number or a list of numbers


class LeftOut(NamedTuple):
    """Image that cannot be used."""

    path: str  # as written in the table
    reason: str
    where: str  # file and line


@dataclass(frozen=True)
class Samples:
    """Samples of one or several tables, numbered consecutively.

    Args:
        tables: tables with captions.
        captions: `random`: a sample is an image with all its captions; `all`: a sample is a row.
        limits: limits for images.
    """

    tables: tuple[PairTable, ...]
    captions: Captions
    limits: ImageLimits

    def __len__(self) -> int:
        return self._ends[-1]

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(table.images if self._by_image else len(table) for table in self.tables))

    @property
    def _by_image(self) -> bool:
        return self.captions is Captions.random

    @property
    def several_captions(self) -> bool:
        """True if a sample may have several captions."""
        return self._by_image and any(table.images < len(table) for table in self.tables)

    @property
    def shapes(self) -> dict[str, Shape]:
        """Further columns by name: shape of the numbers in each row, or None for texts."""
        return self.tables[0].shapes

    def fingerprint(self, numbers: range) -> str:
        """Return a hash that changes when an image of these samples is moved or changed."""
        rows: dict[int, list[int]] = {}
        for number in numbers:
            table, of_sample = self._locate(number)
            rows.setdefault(table, []).append(of_sample[0])
        return " ".join(
            TableImages(self.tables[table], first, self.limits.outside_root).fingerprint()
            for table, first in rows.items()
        )

    def read(self, numbers: range) -> Iterator[Sample | LeftOut]:
        """Read the images of samples. Their headers are checked, the pixels are not decoded."""
        for number in numbers:
            position, rows = self._locate(number)
            table, row = self.tables[position], rows[0]
            try:
                data = table.read_image(row, self.limits)
                extension = extension_of(open_image_bytes(data, self.limits).format)
            except BadImage as error:
                yield LeftOut(table.path(row), str(error), table.where(row))
                continue
            columns = {name: table.json_column(name, row) for name in table.shapes}
            yield Sample(f"{number:09d}", extension, data, [table.caption(row) for row in rows], columns)

    def unreadable(self, left_out: LeftOut) -> str:
        """Return the error message for an image that cannot be used, if that is an error."""
        return (
            f"The image {left_out.path!r} ({left_out.where}) cannot be used: {left_out.reason}. Repair it, or leave out such images: "
            "data.on_bad_image=replace."
        )

    def _locate(self, number: int) -> tuple[int, list[int]]:
        """Return the position of the table of a sample, and the rows of the sample."""
        position = bisect_right(self._ends, number)
        local = number - (self._ends[position - 1] if position else 0)
        return position, self.tables[position].rows_of(local).tolist() if self._by_image else [local]


def extension_of(format: str | None) -> str:
    """Return the extension of images of a format, by Pillow's name.

    Raises:
        BadImage: readers of shards do not look for images of this format.
    """
    if format in JPEGS:
        return "jpg"
    known = Image.registered_extensions()
    found = next((extension for extension in IMAGES if known.get(f".{extension}") == format), None)
    if found is None:
        raise BadImage(f"{NOT_ALLOWED}: {format}, which shards cannot have")
    return found
