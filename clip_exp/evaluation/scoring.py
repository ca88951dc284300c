"""From a prepared task and a model to metrics, and to the record of how they were made."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from clip_exp.config.schema import ImageTowerConfig
from clip_exp.evaluation.classification import build_classifier, classify_dataset
from clip_exp.evaluation.encode import EncodeOptions, encode_images, encode_texts
from clip_exp.evaluation.metrics import retrieval
from clip_exp.evaluation.tasks import ClassificationTask, RetrievalTask, Task
from clip_exp.models.clip import CLIP
from clip_exp.text.tokenizer import Tokenizer

TEXT_BATCH = {"cpu": 256, "cuda": 1024}  # texts encoded at a time: one costs a fraction of a picture
LISTED = 100  # names written into a protocol


class Subject(NamedTuple):
    """What is evaluated, and how its inputs are made."""

    model: CLIP
    tokenizer: Tokenizer
    tower: ImageTowerConfig
    options: EncodeOptions


def score(task: Task, subject: Subject) -> dict[str, Any]:
    """`{"metrics": {name: value}, "protocol": {…}}` of one task."""
    truncated = subject.tokenizer.truncated
    metrics, protocol = SCORERS[type(task)](task, subject)
    protocol["truncated_texts"] = subject.tokenizer.truncated - truncated
    size = subject.tower.image_size
    preprocessing = {
        "resize": f"shorter side {size}, bicubic, Pillow",
        "crop": f"center {size}",
        "mean": subject.tower.mean,
        "std": subject.tower.std,
    }
    return {
        "metrics": metrics,
        "protocol": {**protocol, "preprocessing": preprocessing, "precision": subject.options.precision},
    }


def score_classification(task: ClassificationTask, subject: Subject) -> tuple[dict[str, float], dict[str, Any]]:
    """`top1`, `top5`, `mean_per_class_recall` of zero-shot classification."""
    device, images = subject.options.device, task.images
    classifier = build_classifier(
        subject.model,
        subject.tokenizer,
        images.class_names,
        task.templates,
        TEXT_BATCH[device.type],
        device,
        progress=True,
    )
    encoded = encode_images(subject.model, images.paths, subject.tower, subject.options, f"{task.name}: pictures")
    metrics = classify_dataset(encoded.features, torch.tensor(images.labels)[encoded.kept], classifier)
    protocol = {
        "kind": "zero_shot",
        "data": _absolute(images.where),
        **_pictures(len(encoded.kept), encoded.bad),
        "unlabeled_pictures": images.unlabeled,
        "classes": len(images.class_names),
        "classes_source": _source(task.config.classes),
        "classes_sha256": _hash(images.class_names),
        "classes_without_pictures": len(images.missing),
        "templates": len(task.templates),
        "templates_source": _source(task.config.templates),
        "templates_sha256": _hash(task.templates),
    }
    if task.config.classes != "imagenet":
        pairs = zip(images.keys, images.class_names, strict=True)
        protocol["names"] = (
            {key: name for key, name in pairs if key is not None} if len(images.keys) <= LISTED else None
        )
    return metrics, protocol


def score_retrieval(task: RetrievalTask, subject: Subject) -> tuple[dict[str, float], dict[str, Any]]:
    """Recall and median rank both ways. The captions of a picture that is left out are left out too."""
    device = subject.options.device
    encoded = encode_images(subject.model, task.paths, subject.tower, subject.options, f"{task.name}: pictures")
    caption_image = torch.tensor(task.caption_image)
    kept = torch.isin(caption_image, encoded.kept)
    captions = [task.captions[i] for i in kept.nonzero().flatten().tolist()]
    text_features = encode_texts(
        subject.model, subject.tokenizer, captions, TEXT_BATCH[device.type], device, f"{task.name}: captions"
    )
    rows = torch.searchsorted(encoded.kept, caption_image[kept])
    metrics = retrieval(encoded.features.to(device), text_features, rows.to(device))
    protocol = {
        "kind": "retrieval",
        "data": _absolute(task.where),
        **_pictures(len(encoded.kept), encoded.bad),
        "captions": len(captions),
        "image_to_text": "a hit if any caption of the picture is among the first k",
    }
    return metrics, protocol


SCORERS: dict[type[Task], Callable[[Any, Subject], tuple[dict[str, float], dict[str, Any]]]] = {
    ClassificationTask: score_classification,
    RetrievalTask: score_retrieval,
}


def _pictures(scored: int, bad: list[str]) -> dict[str, Any]:
    return {"pictures": scored, "bad_pictures": len(bad), **({"bad": bad[:LISTED]} if bad else {})}


def _absolute(where: str) -> str:
    return str(Path(where).resolve()) if Path(where).exists() else where


def _source(value: Any) -> Any:
    return value if isinstance(value, str) or len(value) <= LISTED else f"{len(value)} given"


def _hash(lines: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
