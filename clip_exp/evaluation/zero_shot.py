"""Scoring of zero-shot classification."""

from typing import Any

import torch
from torch import Tensor

from clip_exp.evaluation.classification import classify
from clip_exp.evaluation.features import EncodedImages
from clip_exp.evaluation.metrics import accuracies
from clip_exp.evaluation.prepared import ClassificationTask
from clip_exp.evaluation.subject import (
    LISTED,
    Judge,
    Subject,
    absolute,
    counts,
    encode_set,
    hash_of,
    source_of,
    zero_shot_classifier,
)
from clip_exp.reports.results import Classified, Result


def score_classification(task: ClassificationTask, subject: Subject) -> Judge:
    """Return what scores zero-shot classification: see `evaluation.metrics.accuracies`."""
    classifier = zero_shot_classifier(task.images.class_names, task.templates, subject)
    encoded = encode_set(task.name, task.images.pictures, subject)
    return lambda: judge_classification(task, encoded, classifier)


def judge_classification(task: ClassificationTask, encoded: EncodedImages, classifier_CD: Tensor) -> Result:
    """The result of a zero-shot task whose pictures and classes are encoded."""
    images = task.images
    labels = torch.tensor(images.labels)[encoded.kept]
    best, probabilities = classify(encoded.features, classifier_CD)
    details = Classified(
        images.pictures,
        encoded.kept.numpy(),
        labels.numpy(),
        best.numpy(),
        probabilities.numpy(),
        images.class_names,
        images.keys,
    )
    return Result(accuracies(best, labels, len(images.class_names)), _protocol(task, encoded), details)


def _protocol(task: ClassificationTask, encoded: EncodedImages) -> dict[str, Any]:
    images = task.images
    protocol = {
        "kind": "zero_shot",
        "data": absolute(images.where),
        **counts(encoded),
        "unlabeled_pictures": images.unlabeled,
        **images.about,
        "classes": len(images.class_names),
        "classes_source": source_of(task.config.classes),
        "classes_sha256": hash_of(images.class_names),
        "classes_without_pictures": len(images.missing),
        "templates": len(task.templates),
        "templates_source": source_of(task.config.templates),
        "templates_sha256": hash_of(task.templates),
    }
    if task.config.classes != "imagenet":
        pairs = zip(images.keys, images.class_names, strict=True)
        protocol["names"] = (
            {key: name for key, name in pairs if key is not None} if len(images.keys) <= LISTED else None
        )
    return protocol
