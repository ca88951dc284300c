"""Pictures to evaluate on, by position: files, rows of a table, or what a library keeps in a form of its own. No torch."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Protocol

import numpy as np
from PIL import Image

from clip_exp.data.contents import Stored, stamps
from clip_exp.data.files import ImageLimits
from clip_exp.data.names import normal_path
from clip_exp.data.tables.table import PairTable


class Pictures(Protocol):
    """A sequence of pictures; picklable, since worker processes open them."""

    def __len__(self) -> int: ...

    def open(self, index: int, max_pixels: int) -> Image.Image:
        """The picture in its own mode, as the published protocol sees it (`data.images.open_image`).

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
        """A hash that changes when a picture does; what is cached about the pictures is filed under it."""
        ...


class PictureFiles:
    """Pictures in files.

    Args:
        paths: of the files.
        border: pixels that are cut off on every side; ObjectNet's pictures have a red frame.
    """

    def __init__(self, paths: Sequence[str | Path], border: int = 0) -> None:
        self.paths = np.array([str(path) for path in paths])  # one block of memory that workers share
        self.border = border

    def __len__(self) -> int:
        return len(self.paths)

    def open(self, index: int, max_pixels: int) -> Image.Image:
        picture = _images().open_image(self.name(index), max_pixels)
        if not self.border:
            return picture
        return picture.crop((self.border, self.border, picture.width - self.border, picture.height - self.border))

    def name(self, index: int) -> str:
        return str(self.paths[index])

    def stored(self, index: int) -> Stored:
        return Stored(self.name(index))

    def fingerprint(self) -> str:
        """Of names, sizes, times of change and samples of the content (`contents.stamps`): reading all of it takes as long as encoding."""
        return fingerprint_of([self.stored(index) for index in range(len(self))], f"border {self.border}")


class TablePictures:
    """Pictures of a table's rows, in files anywhere or in shards.

    Args:
        table: of pictures.
        rows: one for each picture.
        outside_root: see `ImageLimits`.
    """

    def __init__(self, table: PairTable, rows: Sequence[int], outside_root: bool = False) -> None:
        self.table, self.rows, self.outside_root = table, np.array(rows, dtype=np.int64), outside_root

    def __len__(self) -> int:
        return len(self.rows)

    def open(self, index: int, max_pixels: int) -> Image.Image:
        images = _images()
        limits = ImageLimits(max_pixels, max_bytes=images.MAX_EVALUATED_BYTES, outside_root=self.outside_root)
        return images.decode(self.table.read_picture(int(self.rows[index]), limits), limits)

    def name(self, index: int) -> str:
        return self.table.image_path(int(self.rows[index]))

    def stored(self, index: int) -> Stored:
        row = int(self.rows[index])
        if self.table.members is None:
            return Stored(self.table.image_path(row))
        offset, size = self.table.members[row].tolist()
        return Stored(str(self.table.part(row).file), offset, size)

    def fingerprint(self) -> str:
        """As `PictureFiles` has it; of shards, with the pictures' places in them."""
        return fingerprint_of([self.stored(index) for index in range(len(self))], "border 0")


def _images() -> ModuleType:
    """Import torch only when an image is opened: finding images needs none."""
    from clip_exp.data import images

    return images


def fingerprint_of(places: Sequence[Stored], about: str) -> str:
    """Return a hash that changes when a place is another one, or what is there.

    Args:
        about: what else it depends on.
    """
    digest = hashlib.sha256(f"{about}\n".encode())
    for place, stamp in zip(places, stamps(places), strict=True):
        line = f"{normal_path(place.file)}\t{place.offset}\t{tuple(stamp)}\n"
        digest.update(line.encode(errors="surrogateescape"))
    return digest.hexdigest()
