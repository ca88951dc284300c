"""Labelled images to learn from and labelled images to score on: their classes are made the same ones, and how many are in both. No torch.

Every image costs a look at its file's size and number (`os.stat`). The contents are compared only of images whose sizes are equal: first a sample,
then, where these are equal, all bytes. With sizes as those of ImageNet (1.3 million and 50 thousand images, log-normal) that is a sample of
nearly every validation image and of a quarter of the training images; next to nothing is read whole.
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


def prepare_halves(
    name: str, task: LabeledDataConfig, train: LabeledDataConfig, output_dir: str
) -> tuple[LabeledImages, LabeledImages, Overlap | None]:
    """Find and match the images to learn from and those to score; how many are in both, None where they cannot be compared.

    Raises:
        ConfigError: the images to score are those to learn from.
        DataError: see `match_classes`.
    """
    where = f"task.{name}"
    learned, scored = match_classes(
        labeled_images(train, f"{where}.train", output_dir, split="train"),
        labeled_images(task, where, output_dir),
        where,
    )
    overlap = find_overlap(learned.images, scored.images, f"{name}: comparing the images of both parts")
    if overlap is not None and overlap.images == overlap.scored:
        copies = f", {overlap.equal_content:,} of them as copies" if overlap.equal_content else ""
        raise ConfigError(
            f"{where}.train is the data that is scored: all {overlap.scored:,} images of {scored.where} are among those of "
            f"{learned.where}{copies}. Give other images to learn from."
        )
    return learned, scored, overlap


def match_classes(train: LabeledImages, test: LabeledImages, where: str) -> tuple[LabeledImages, LabeledImages]:
    """Both with the same classes: those of which `train` has images, in its order.

    A class of `test` is the class of `train` with the same key (folder or label), else the one with the same name. Classes
    of which `test` has no images may be predicted, as in zero-shot classification. Names are `test`'s where it has them.
    """
    present = sorted(set(train.labels))
    if len(present) < 2:
        raise DataError(f"{where}.train: all images of {train.where} are of one class; there is nothing to learn.")
    position = _positions(train, test, present)
    scored = sorted(set(test.labels))
    if unknown := [label for label in scored if label not in position]:
        raise DataError(
            f"{where}: {listing(_labels_of(test, unknown))} of {test.where} is no class of the images to learn from, "
            f"{train.where}: {listing(_labels_of(train, present))}. Give both the same folders or labels, or the same "
            "names by `classes`."
        )
    if len({position[label] for label in scored}) < len(scored):
        raise DataError(f"{where}: several classes of {test.where} are one class of {train.where}: rename them.")
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
    """Where the classes of `test` are in `present`, as far as `train` has them."""
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
    number = np.unique(np.concatenate([of_train, of_test])[:, :SIZE], axis=0, return_inverse=True)[1].reshape(-1)
    known, own = number[: len(of_train)], number[len(of_train) :]
    same = np.isin(own, known[of_train[:, SIZE] > 0]) & (of_test[:, SIZE] > 0)
    # Contents: of other files of test and files of train that have a size in common.
    size_of_train, size_of_test = of_train[:, SIZE], np.where(same, 0, of_test[:, SIZE])
    ours = np.flatnonzero(np.isin(size_of_test, size_of_train) & (size_of_test > 0))
    theirs = np.flatnonzero(np.isin(size_of_train, size_of_test[ours]))
    found = [*map(test.stored, ours.tolist()), *map(train.stored, theirs.tolist())]
    copied = np.zeros(len(test), dtype=bool)
    for group in equal_contents([place for place in found if place is not None]):  # all of them: they have sizes
        if group[-1] >= len(ours):
            copied[ours[[position for position in group if position < len(ours)]]] = True
    examples = [test.name(index) for index in np.flatnonzero(same | copied)[:EXAMPLES].tolist()]
    return Overlap(len(test), int(same.sum()), int(copied.sum()), examples)


def _places(images: ImageSet, advance: Callable[[int], None]) -> np.ndarray:
    """uint64 [N, 4]: of each image the device and the number of its file, and offset and size in it. A size of 0: there is no such file."""
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
    if stored is None or status is None or not stat.S_ISREG(status.st_mode):  # a pipe would block who reads it
        return 0, 0, 0, 0
    return status.st_dev, status.st_ino, stored.offset, status.st_size if stored.size is None else stored.size
