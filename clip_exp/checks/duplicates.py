"""The same image, caption or pair more than once: within a split, and in both of them."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from clip_exp.checks.scan import Scanned
from clip_exp.checks.statistics import fraction


class Leak(NamedTuple):
    """A validation image that training sees too."""

    val_image: int
    train_image: int


@dataclass(frozen=True)
class Leakage:
    """Images of one split that are in another."""

    # By number of the validation image, in order.
    same_bytes: list[Leak]
    same_path: list[Leak]
    images: int  # distinct validation images in either
    fraction: float  # of the validation images
    pairs: np.ndarray  # int64: validation rows whose image and caption both are in one row of training


class Equalities:
    """Which images, captions and pairs are the same, over all splits.

    Attributes:
        contents: number of each image's bytes, of each split.
        captions: number of each row's caption, int64, of each split: equal ones have equal numbers.
        pairs: number of each row's image and caption together, int64, of each split.
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
    """int64 [images], of each split: equal bytes have equal numbers over all splits.

    Args:
        digests: uint64 [N, 2], of the images of each split that were read.
        numbers: which ones these are, int64 [N].
        images: how many each split has; those that were not read are taken to be unlike any other.
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
    """Positions of equal numbers, a group for each that appears more than once, the largest first."""
    order = np.argsort(numbers, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(numbers[order]) != 0])
    sizes = np.diff(np.r_[starts, len(numbers)])
    several = np.flatnonzero(sizes > 1)
    several = several[np.argsort(-sizes[several], kind="stable")]
    return [order[starts[at] : starts[at] + sizes[at]] for at in several]


def find_leakage(
    contents: tuple[np.ndarray, np.ndarray], paths: tuple[np.ndarray, np.ndarray], pairs: tuple[np.ndarray, np.ndarray]
) -> Leakage:
    """What validation shares with training; each argument is that of training, then that of validation.

    Args:
        contents: `number_contents`.
        paths: a hash of each image's path.
        pairs: `Equalities.pairs`.
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
