"""Images to score that are among those to learn from too: under the same path, another one, or as copies. No torch.

Every image costs a look at its file's size and number (`os.stat`). The contents are compared only of images whose sizes are equal: first a sample,
then, where these are equal, all bytes. With sizes as those of ImageNet (1.3 million and 50 thousand images, log-normal) that is a sample of
nearly every validation image and of a quarter of the training images; next to nothing is read whole.
"""

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from clip_exp.data.files import Stored, equal_contents
from clip_exp.data.pictures import Pictures
from clip_exp.progress import progress

CHUNK = 4096  # images between updates of the progress bar
EXAMPLES = 5
SIZE = 3  # column of `_places`


@dataclass(frozen=True)
class Overlap:
    """How many of the images to score are among those to learn from."""

    scored: int  # images to score
    same_file: int
    equal_content: int  # in another file
    examples: list[str]  # names of the first of them

    @property
    def images(self) -> int:
        """Images to score that are among those to learn from."""
        return self.same_file + self.equal_content

    def protocol(self) -> dict[str, Any]:
        """For a protocol."""
        if not self.images:
            return {"images": 0}
        counts = {"same_file": self.same_file, "equal_content": self.equal_content}
        return {"images": self.images, **counts, "examples": self.examples}


def find_overlap(train: Pictures, test: Pictures, what: str | None = None) -> Overlap | None:
    """Compare the images to learn from with those to score.

    Args:
        what: name of the progress bar; None for none.
    Returns:
        None where one of the two keeps its images in a form of its own, so that they cannot be compared. The same such set twice is a
        complete overlap.
    """
    if train.stored(0) is None or test.stored(0) is None:
        twice = train.fingerprint() == test.fingerprint()
        return Overlap(len(test), len(test), 0, [test.name(0)]) if twice else None
    with progress(len(train) + len(test), what) as advance:
        of_train, of_test = _places(train, advance), _places(test, advance)
    same = _same_files(of_train, of_test)
    copied = _copies(train, test, of_train[:, SIZE], np.where(same, 0, of_test[:, SIZE]))
    examples = [test.name(index) for index in np.flatnonzero(same | copied)[:EXAMPLES].tolist()]
    return Overlap(len(test), int(same.sum()), int(copied.sum()), examples)


def _places(pictures: Pictures, advance: Callable[[int], None]) -> np.ndarray:
    """uint64 [N, 4]: of each image the device and the number of its file, and offset and size in it. A size of 0: there is no such file."""
    places = np.zeros((len(pictures), 4), dtype=np.uint64)
    for start in range(0, len(pictures), CHUNK):
        indices = range(start, min(start + CHUNK, len(pictures)))
        places[start : indices.stop] = [_place(pictures.stored(index)) for index in indices]
        advance(len(indices))
    return places


def _place(stored: Stored | None) -> tuple[int, int, int, int]:
    try:
        status = os.stat(stored.file) if stored is not None else None
    except (OSError, ValueError):  # ValueError: a NUL in the name
        status = None
    if stored is None or status is None or not stat.S_ISREG(status.st_mode):  # a pipe would block who reads it
        return 0, 0, 0, 0
    return status.st_dev, status.st_ino, stored.offset, status.st_size if stored.size is None else stored.size


def _same_files(of_train: np.ndarray, of_test: np.ndarray) -> np.ndarray:
    """bool [test]: the image is one to learn from."""
    number = np.unique(np.concatenate([of_train, of_test])[:, :SIZE], axis=0, return_inverse=True)[1].reshape(-1)
    known, own = number[: len(of_train)], number[len(of_train) :]
    return np.isin(own, known[of_train[:, SIZE] > 0]) & (of_test[:, SIZE] > 0)


def _copies(train: Pictures, test: Pictures, size_of_train: np.ndarray, size_of_test: np.ndarray) -> np.ndarray:
    """bool [test]: an image to learn from has the same bytes. Sizes of 0 are not compared."""
    ours = np.flatnonzero(np.isin(size_of_test, size_of_train) & (size_of_test > 0))
    theirs = np.flatnonzero(np.isin(size_of_train, size_of_test[ours]))
    found = [*map(test.stored, ours.tolist()), *map(train.stored, theirs.tolist())]
    places = [place for place in found if place is not None]  # all of them: they have sizes
    copied = np.zeros(len(test), dtype=bool)
    for group in equal_contents(places):
        if group[-1] >= len(ours):
            copied[ours[[position for position in group if position < len(ours)]]] = True
    return copied
