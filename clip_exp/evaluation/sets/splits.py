"""Training and test images of a learned classification: matching of their classes, and their overlap. Does not import torch.

The overlap check calls `os.stat` for every image. Only images of equal size are compared: first a sample of their bytes and, if the
samples are equal, all bytes. For file sizes as in ImageNet (1.3 million and 50 thousand images, log-normal) a sample of almost every
validation image and of a quarter of the training images is read, and almost no image completely.
"""

import os
import stat
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from clip_exp.config.evaluation import LabeledDataConfig
from clip_exp.data.files import Stored, equal_contents
from clip_exp.data.image_sets import ImageSet
from clip_exp.errors import ConfigError, DataError
from clip_exp.evaluation.sets.datasets import labeled_images
from clip_exp.evaluation.sets.labeled import LabeledImages, listing
from clip_exp.progress import progress

CHUNK = 4096  # images between updates of the progress bar
EXAMPLES = 5
SIZE = 3  # column of `_places`


@dataclass(frozen=True)
class Overlap:
    """Number of test images that are also training images."""

    scored: int  # number of test images
    same_file: int
    equal_content: int  # same bytes in another file
    examples: list[str]  # names of the first such images

    @property
    def images(self) -> int:
        """Number of test images that are also training images."""
        return self.same_file + self.equal_content

    def protocol(self) -> dict[str, Any]:
        """Return the overlap for the evaluation settings."""
        if not self.images:
            return {"images": 0}
        counts = {"same_file": self.same_file, "equal_content": self.equal_content}
        return {"images": self.images, **counts, "examples": self.examples}


def prepare_train_and_test(
    name: str, task: LabeledDataConfig, train: LabeledDataConfig, output_dir: str
) -> tuple[LabeledImages, LabeledImages, Overlap | None]:
    """Return the training and test images of a task with the same classes, and their overlap.

    The overlap is None if the images cannot be compared.

    Args:
        name: name of the task.
        task: configuration of the test images.
        train: configuration of the training images.
        output_dir: folder for generated data.

    Raises:
        ConfigError: all test images are training images.
        DataError: see `match_classes`.
    """
    where = f"task.{name}"
    learned, scored = match_classes(
        labeled_images(train, f"{where}.train", output_dir, split="train"),
        labeled_images(task, where, output_dir),
        where,
    )
    overlap = find_overlap(learned.images, scored.images, f"{name}: comparing training and test images")
    if overlap is not None and overlap.images == overlap.scored:
        copies = f", {overlap.equal_content:,} of them as copies" if overlap.equal_content else ""
        raise ConfigError(
            f"{where}.train has the test images: all {overlap.scored:,} images of {scored.where} are also in "
            f"{learned.where}{copies}. Use other training images."
        )
    return learned, scored, overlap


def match_classes(train: LabeledImages, test: LabeledImages, where: str) -> tuple[LabeledImages, LabeledImages]:
    """Return training and test images with the same classes: those with training images, in the order of `train`.

    A class of `test` is matched with the class of `train` that has the same key (folder or label), else the same name. Classes
    without test images may be predicted, as in zero-shot classification. Names of `test` have priority.

    Args:
        train: training images.
        test: test images.
        where: key of the task, for messages.

    Raises:
        DataError: there are fewer than two classes, a class of `test` has no match, or two of them have the same.
    """
    present = sorted(set(train.labels))
    if len(present) < 2:
        raise DataError(
            f"{where}.train: all images of {train.where} have the same class: at least two classes are required."
        )
    position = _positions(train, test, present)
    scored = sorted(set(test.labels))
    if unknown := [label for label in scored if label not in position]:
        raise DataError(
            f"{where}: classes of {test.where} without training images: {listing(_labels_of(test, unknown))}. The classes of "
            f"{train.where} are {listing(_labels_of(train, present))}. Use the same folders or labels for both, or the same "
            "names in `classes`."
        )
    if len({position[label] for label in scored}) < len(scored):
        raise DataError(f"{where}: several classes of {test.where} match the same class of {train.where}: rename them.")
    new = {label: there for there, label in enumerate(present)}
    name_of = {there: test.class_names[label] for label, there in position.items()}
    names = [name_of.get(there, train.class_names[label]) for label, there in new.items()]
    keys: list[str | None] = [*_labels_of(train, present)]
    of_test: list[str | None] = [None] * len(present)
    for label in scored:
        of_test[position[label]] = keys[position[label]]
    return (
        replace(train, labels=[new[label] for label in train.labels], class_names=names, keys=keys, imagenet=None),
        replace(
            test, labels=[position[label] for label in test.labels], class_names=names, keys=of_test, imagenet=None
        ),
    )


def _positions(train: LabeledImages, test: LabeledImages, present: list[int]) -> dict[int, int]:
    """Return the position in `present` of each class of `test` that `train` has."""
    by_key = {_key(train, label): there for there, label in enumerate(present)}
    names = [train.class_names[label] for label in present]
    count = Counter(names)
    by_name = {name: there for there, name in enumerate(names) if count[name] == 1}
    found = {}
    for label, name in enumerate(test.class_names):
        key = _key(test, label)
        if key is not None and key in by_key:
            found[label] = by_key[key]
        elif name in by_name:
            found[label] = by_name[name]
    return found


def _key(images: LabeledImages, label: int) -> str | None:
    return images.keys[label] if images.keys else None


def _labels_of(images: LabeledImages, labels: list[int]) -> list[str]:
    return [_key(images, label) or images.class_names[label] for label in labels]


# ------------------------------------------------------------------------------------------------------- overlap


def find_overlap(train: ImageSet, test: ImageSet, what: str | None = None) -> Overlap | None:
    """Return the overlap of training and test images.

    Args:
        train: training images.
        test: test images.
        what: name of the progress bar; None: no progress bar.

    Returns:
        None if one of them does not store its images as files, so that they cannot be compared. If both are the same such dataset,
        the overlap is complete.
    """
    if train.stored(0) is None or test.stored(0) is None:
        twice = train.fingerprint() == test.fingerprint()
        return Overlap(len(test), len(test), 0, [test.name(0)]) if twice else None
    with progress(len(train) + len(test), what) as advance:
        of_train, of_test = _places(train, advance), _places(test, advance)
    number = np.unique(np.concatenate([of_train, of_test])[:, :SIZE], axis=0, return_inverse=True)[1].reshape(-1)
    known, own = number[: len(of_train)], number[len(of_train) :]
    same = np.isin(own, known[of_train[:, SIZE] > 0]) & (of_test[:, SIZE] > 0)
    # Contents are compared for the other test files that have the size of a training file.
    size_of_train, size_of_test = of_train[:, SIZE], np.where(same, 0, of_test[:, SIZE])
    ours = np.flatnonzero(np.isin(size_of_test, size_of_train) & (size_of_test > 0))
    theirs = np.flatnonzero(np.isin(size_of_train, size_of_test[ours]))
    found = [*map(test.stored, ours.tolist()), *map(train.stored, theirs.tolist())]
    copied = np.zeros(len(test), dtype=bool)
    for group in equal_contents([place for place in found if place is not None]):  # no None: all of them have sizes
        if group[-1] >= len(ours):
            copied[ours[[position for position in group if position < len(ours)]]] = True
    examples = [test.name(index) for index in np.flatnonzero(same | copied)[:EXAMPLES].tolist()]
    return Overlap(len(test), int(same.sum()), int(copied.sum()), examples)


def _places(images: ImageSet, advance: Callable[[int], None]) -> np.ndarray:
    """Return uint64 [N, 4]: device and inode of the file, offset and size in it. Size 0: no such file."""
    places = np.zeros((len(images), 4), dtype=np.uint64)
    for start in range(0, len(images), CHUNK):
        indices = range(start, min(start + CHUNK, len(images)))
        places[start : indices.stop] = [_place(images.stored(index)) for index in indices]
        advance(len(indices))
    return places


def _place(stored: Stored | None) -> tuple[int, int, int, int]:
    try:
        status = os.stat(stored.file) if stored is not None else None
    except (OSError, ValueError):  # ValueError: a NUL in the name
        status = None
    if stored is None or status is None or not stat.S_ISREG(status.st_mode):  # reading a pipe would block
        return 0, 0, 0, 0
    return status.st_dev, status.st_ino, stored.offset, status.st_size if stored.size is None else stored.size
