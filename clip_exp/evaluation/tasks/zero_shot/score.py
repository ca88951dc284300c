"""Zero-shot classification of a task's pictures (`evaluation.classification`)."""

import torch
from torch import Tensor

from clip_exp.evaluation.classification import accuracies, classified, classify
from clip_exp.evaluation.features import EncodedImages
from clip_exp.evaluation.subject import LISTED, Judge, Subject, absolute, counts, hash_of, source_of
from clip_exp.evaluation.tasks.zero_shot import ClassificationTask
from clip_exp.reports.evaluation import Result


def score_classification(task: ClassificationTask, subject: Subject) -> Judge:
    """Return what scores zero-shot classification: see `accuracies`."""
    classifier = subject.classifier(task.images.class_names, task.templates)
    encoded = subject.encode_images(task.name, task.images.pictures)
    return lambda: judge_classification(task, encoded, classifier)


def judge_classification(task: ClassificationTask, encoded: EncodedImages, classifier_CD: Tensor) -> Result:
    """The result of a zero-shot task whose pictures and classes are encoded."""
    images = task.images
    labels = torch.tensor(images.labels)[encoded.kept]
    best, probabilities = classify(encoded.features, classifier_CD)
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
        named = {key: name for key, name in zip(images.keys, images.class_names, strict=True) if key is not None}
        protocol["names"] = named if len(images.keys) <= LISTED else None
    details = classified(images, encoded, labels, best, probabilities)
    return Result(accuracies(best, labels, len(images.class_names)), protocol, details)
