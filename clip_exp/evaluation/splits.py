"""Labelled pictures to learn from and labelled pictures to score on, whose classes are the same ones. No torch."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from clip_exp.config.evaluation import LabeledDataConfig
from clip_exp.errors import ConfigError, DataError
from clip_exp.evaluation.sets.datasets import labeled_images
from clip_exp.evaluation.sets.labeled import LabeledImages, listing
from clip_exp.evaluation.sets.overlap import Overlap, find_overlap
from clip_exp.evaluation.tasks.linear_probe import LinearProbeTaskConfig


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
    overlap = find_overlap(learned.pictures, scored.pictures, f"{name}: comparing the images of both parts")
    if overlap is not None and overlap.images == overlap.scored:
        copies = f", {overlap.equal_content:,} of them as copies" if overlap.equal_content else ""
        raise ConfigError(
            f"{where}.train is the data that is scored: all {overlap.scored:,} images of {scored.where} are among those of "
            f"{learned.where}{copies}. Give other images to learn from."
        )
    return learned, scored, overlap


def match_classes(train: LabeledImages, test: LabeledImages, where: str) -> tuple[LabeledImages, LabeledImages]:
    """Both with the same classes: those of which `train` has pictures, in its order.

    A class of `test` is the class of `train` with the same key (folder or label), else the one with the same name. Classes
    of which `test` has no pictures may be predicted, as in zero-shot classification. Names are `test`'s where it has them.

    Raises:
        DataError: pictures of `test` belong to no class of `train`; two of its classes are the same one of `train`; `train`
            has fewer than two classes.
    """
    present = sorted(set(train.labels))
    if len(present) < 2:
        raise DataError(f"{where}.train: all pictures of {train.where} are of one class; there is nothing to learn.")
    position = _positions(train, test, present)
    scored = sorted(set(test.labels))
    if unknown := [label for label in scored if label not in position]:
        raise DataError(
            f"{where}: {listing(_labels_of(test, unknown))} of {test.where} is no class of the pictures to learn from, "
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


def require_division(labels: Sequence[int], class_names: list[str], task: LinearProbeTaskConfig, name: str) -> None:
    """That a share of every class can be held out, where several strengths are to choose from.

    Raises:
        DataError: a class has one picture, or a part would have fewer pictures than there are classes.
    """
    if task.c is not None and len(task.c) == 1:
        return
    counts = Counter(labels)
    fix = f"Give one strength (task.{name}.c=[10]): then all pictures are fitted, and none are needed to choose."
    if single := sorted(label for label, count in counts.items() if count == 1):
        listed = listing([class_names[label] for label in single])
        raise DataError(f"task.{name}.train: {listed} has one picture, so no share of it can be held out. {fix}")
    held_out = math.ceil(len(labels) * task.val_fraction)
    if min(held_out, len(labels) - held_out) < len(counts):
        raise DataError(
            f"task.{name}.val_fraction={task.val_fraction} of {len(labels)} pictures: a part would have fewer than one "
            f"of each of the {len(counts)} classes. {fix}"
        )


def _key(images: LabeledImages, label: int) -> str | None:
    return images.keys[label] if images.keys else None


def _labels_of(images: LabeledImages, labels: list[int]) -> list[str]:
    return [_key(images, label) or images.class_names[label] for label in labels]
