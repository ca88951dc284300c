"""Detection of duplicate images, captions and pairs, within a split and between training and validation (leakage)."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from clip_exp.checks.scan import Scanned
from clip_exp.checks.statistics import fraction


class Leak(NamedTuple):
    """Validation image that is also a training image."""

    val_image: int
    train_image: int


@dataclass(frozen=True)
class Leakage:
    """Validation images and pairs that are also in the training data."""

    # Sorted by the number of the validation image.
    same_bytes: list[Leak]
    same_path: list[Leak]
    images: int  # number of distinct validation images in either list
    fraction: float  # `images` divided by the number of validation images
    pairs: np.ndarray  # int64: validation rows whose image and caption are together in a training row


class Equalities:
    """Numbering of images, captions and pairs over all splits, in which equal ones have equal numbers.

    Attributes:
        contents: for each split, int64 [images], numbers by the bytes of the images.
        captions: for each split, int64 [rows], numbers by the tokens of the captions.
        pairs: for each split, int64 [rows], numbers by image and caption together.
        leakage: None without a validation split.
    """

    def __init__(self, scanned: list[Scanned]) -> None:
        self.contents = number_contents(
            [each.good["digest"] for each in scanned],
            [each.good["image"] for each in scanned],
            [each.images for each in scanned],
        )
        found, numbers = np.unique(np.concatenate([each.rows["caption"] for each in scanned]), return_inverse=True)
        self.captions = np.split(numbers, np.cumsum([len(each.rows) for each in scanned])[:-1])
        self.pairs = [
            contents[each.split.image_of_row] * len(found) + captions
            for each, contents, captions in zip(scanned, self.contents, self.captions, strict=True)
        ]
        self.leakage: Leakage | None = None
        if len(scanned) == 2:
            train, val = (each.rows["path"][each.split.first_rows] for each in scanned)
            self.leakage = find_leakage(
                (self.contents[0], self.contents[1]), (train, val), (self.pairs[0], self.pairs[1])
            )


def number_contents(digests: list[np.ndarray], numbers: list[np.ndarray], images: list[int]) -> list[np.ndarray]:
    """Return for each split int64 [images], with equal numbers for equal bytes in any split.

    Args:
        digests: for each split, uint64 [N, 2], digests of the images that were read.
        numbers: for each split, int64 [N], indices of these images.
        images: number of images of each split. Images that were not read get unique numbers.
    """
    inverse = np.unique(np.concatenate(digests), axis=0, return_inverse=True)[1].reshape(-1)
    fresh = len(inverse)
    contents = []
    for count, read, same in zip(
        images, numbers, np.split(inverse, np.cumsum([len(n) for n in numbers])[:-1]), strict=True
    ):
        of_split = np.arange(fresh, fresh + count)
        of_split[read] = same
        contents.append(of_split)
        fresh += count
    return contents


def equal_groups(numbers: np.ndarray) -> list[np.ndarray]:
    """Return the positions of each number that appears more than once, largest group first."""
    order = np.argsort(numbers, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(numbers[order]) != 0])
    sizes = np.diff(np.r_[starts, len(numbers)])
    several = np.flatnonzero(sizes > 1)
    several = several[np.argsort(-sizes[several], kind="stable")]
    return [order[starts[at] : starts[at] + sizes[at]] for at in several]


def find_leakage(
    contents: tuple[np.ndarray, np.ndarray], paths: tuple[np.ndarray, np.ndarray], pairs: tuple[np.ndarray, np.ndarray]
) -> Leakage:
    """Find the validation images and pairs that are also in the training data.

    Args: each is a tuple of training and validation.
        contents: results of `number_contents`.
        paths: hash of each image's path.
        pairs: see `Equalities.pairs`.
    """

    def common(train: np.ndarray, val: np.ndarray) -> list[Leak]:
        order = np.argsort(train, kind="stable")
        places = np.minimum(np.searchsorted(train[order], val), len(train) - 1)
        found = train[order[places]] == val
        return [Leak(at, int(order[places[at]])) for at in np.flatnonzero(found).tolist()]

    by_bytes, by_path = common(*contents), common(*paths)
    distinct = len({leak.val_image for leak in (*by_bytes, *by_path)})
    leaked_rows = np.flatnonzero(np.isin(pairs[1], pairs[0]))
    return Leakage(by_bytes, by_path, distinct, fraction(distinct, len(contents[1])), leaked_rows)
