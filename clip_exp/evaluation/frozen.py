"""What the tasks share that learn from labelled pictures: features of both halves, and parts of their results."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from clip_exp.errors import DataError
from clip_exp.evaluation.features import EncodedImages, require_finite
from clip_exp.evaluation.subject import LISTED, Subject, absolute, counts, hash_of, source_of
from clip_exp.evaluation.task import LearnedTask

FEATURES = "of unit norm, as encode_image returns them"


class Frozen(NamedTuple):
    """Features and labels of the pictures that could be read."""

    train: EncodedImages
    train_labels: Tensor  # int64 [N]
    test: EncodedImages
    test_labels: Tensor  # int64 [M]


def encode_halves(task: LearnedTask, subject: Subject) -> Frozen:
    """Features of the pictures to learn from and of those to score. Every rank calls, and gets all of them.

    Raises:
        DataError: no picture of a class to learn from can be read.
        NumericError: a feature is not finite.
    """
    train = subject.encode_images(f"{task.name}: train", task.train.pictures)
    test = subject.encode_images(task.name, task.test.pictures)
    require_finite(train.features, "image features")
    require_finite(test.features, "image features")
    train_labels = torch.tensor(task.train.labels)[train.kept]
    count_C = torch.bincount(train_labels, minlength=len(task.train.class_names))
    if not count_C.all():
        name = task.train.class_names[int(count_C.argmin())]
        raise DataError(
            f"task.{task.name}.train: no picture of '{name}' can be read; the first of all: {train.bad[0]}."
        )
    return Frozen(train, train_labels, test, torch.tensor(task.test.labels)[test.kept])


def protocol_of(task: LearnedTask, frozen: Frozen) -> dict[str, Any]:
    """The data of both halves, for a protocol."""
    test, names = task.test, task.test.class_names
    return {
        "data": absolute(test.where),
        **counts(frozen.test),
        "unlabeled_pictures": test.unlabeled,
        **test.about,
        "train": {
            "data": absolute(task.train.where),
            **counts(frozen.train),
            "unlabeled_pictures": task.train.unlabeled,
            **task.train.about,
        },
        "overlap": None if task.overlap is None else task.overlap.protocol(),
        "classes": len(names),
        "classes_source": source_of(task.labeled.classes),
        "classes_sha256": hash_of(names),
        "classes_without_pictures": len(test.missing),
        "names": dict(zip(task.train.keys, names, strict=True)) if len(names) <= LISTED else None,
        "features": FEATURES,
    }
