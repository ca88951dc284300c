"""From a prepared task and a model to a result. Every rank encodes a share; rank 0 scores the whole."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clip_exp.config.load import plain
from clip_exp.config.schema import ModelConfig
from clip_exp.data.transforms import eval_transform
from clip_exp.evaluation.cache import Cache
from clip_exp.evaluation.classification import build_classifier, classify
from clip_exp.evaluation.encode import EncodeOptions, ImageEncoder, encode_pixels, encode_texts
from clip_exp.evaluation.features import EncodedImages, encode_pictures
from clip_exp.evaluation.metrics import accuracies, retrieval
from clip_exp.evaluation.results import Classified, Result
from clip_exp.evaluation.retrieval import examples
from clip_exp.evaluation.tasks import ClassificationTask, RetrievalTask, Task
from clip_exp.models.clip import CLIP
from clip_exp.ranks.group import from_main
from clip_exp.text.tokenizer import Tokenizer

TEXT_BATCH = {"cpu": 256, "cuda": 1024}  # texts encoded at a time: one costs a fraction of a picture
LISTED = 100  # names written into a protocol


@dataclass(frozen=True)
class Subject:
    """What is evaluated, how its inputs are made, and where what it computed is kept."""

    model: CLIP
    tokenizer: Tokenizer
    config: ModelConfig
    options: EncodeOptions
    weights_sha256: str | None = None  # None: the weights change, and nothing is kept
    cache: Cache | None = None

    @property
    def identity(self) -> dict[str, Any] | None:
        """What decides this model's features, as JSON."""
        return None if self.weights_sha256 is None else {"weights": self.weights_sha256, "model": plain(self.config)}

    def image_encoder(self) -> ImageEncoder:
        tower, options = self.config.image, self.options
        return ImageEncoder(
            encode=lambda pixels: encode_pixels(self.model, pixels, tower, options.device, options.precision),
            transform=partial(eval_transform, size=tower.image_size),
            image_size=tower.image_size,
            identity=self.identity,
        )

    def preprocessing(self) -> dict[str, Any]:
        """For a protocol: what happens to a picture before the image tower."""
        tower = self.config.image
        return {
            "resize": f"shorter side {tower.image_size}, bicubic, Pillow",
            "crop": f"center {tower.image_size}",
            "mean": tower.mean,
            "std": tower.std,
        }

    def kept_texts(self, texts: Sequence[str], compute: Callable[[], Tensor], **about: Any) -> Tensor:
        """What `compute` makes of texts, from the cache where it is there. On the device. All ranks call."""
        device = self.options.device
        if self.cache is None or self.identity is None:
            return compute()
        cache, about = self.cache, {"model": self.identity, "texts": hash_of(texts), "device": device.type, **about}
        entry = cache.entry("texts", **about)
        found = from_main(lambda: cache.read(entry, "features"))
        if found is not None:
            return found[0]["features"].to(device)
        features = compute()
        from_main(lambda: cache.write(entry, "features", {"features": features.cpu()}))
        return features


def score(task: Task, subject: Subject) -> Result:
    """The result of one task. Every rank calls and gets it; only rank 0's has details.

    Raises:
        DataError: a picture cannot be read and `on_bad_image` is `error`, or none can be read.
        NumericError: features are not finite.
    """
    truncated = subject.tokenizer.truncated
    judge = SCORERS[type(task)](task, subject)
    details: list[Any] = []

    def judged() -> Result:
        result = judge()
        details.append(result.details)
        return replace(result, details=None)

    result = from_main(judged)
    common = {
        "truncated_texts": subject.tokenizer.truncated - truncated,
        "preprocessing": subject.preprocessing(),
        "precision": subject.options.precision,
    }
    return Result(result.metrics, {**common, **result.protocol}, details[0] if details else None)


Judge = Callable[[], Result]  # what remains after the encoding, for rank 0 alone


def score_classification(task: ClassificationTask, subject: Subject) -> Judge:
    """`top1`, `top5`, `mean_per_class_recall` of zero-shot classification."""
    images = task.images
    classifier = zero_shot_classifier(images.class_names, task.templates, subject)
    encoded = encode_set(task.name, images.pictures, subject)

    def judge() -> Result:
        labels = torch.tensor(images.labels)[encoded.kept]
        best, probabilities = classify(encoded.features, classifier)
        protocol = {
            "kind": "zero_shot",
            "data": _absolute(images.where),
            **counts(encoded),
            "unlabeled_pictures": images.unlabeled,
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
        details = Classified(
            images.pictures,
            encoded.kept.numpy(),
            labels.numpy(),
            best.numpy(),
            probabilities.numpy(),
            images.class_names,
            images.keys,
        )
        return Result(accuracies(best, labels, len(images.class_names)), protocol, details)

    return judge


def score_retrieval(task: RetrievalTask, subject: Subject) -> Judge:
    """Recall and median rank both ways. The captions of a picture that is left out are left out too."""
    device = subject.options.device
    encoded = encode_set(task.name, task.pictures, subject)
    caption_image = torch.tensor(task.caption_image)
    kept = torch.isin(caption_image, encoded.kept)
    captions = [task.captions[i] for i in kept.nonzero().flatten().tolist()]

    def encode() -> Tensor:
        return encode_texts(
            subject.model, subject.tokenizer, captions, TEXT_BATCH[device.type], device, f"{task.name}: captions", True
        )

    text_features = subject.kept_texts(captions, encode)

    def judge() -> Result:
        rows = torch.searchsorted(encoded.kept, caption_image[kept]).to(device)
        image_features = encoded.features.to(device)
        protocol = {
            "kind": "retrieval",
            "data": _absolute(task.where),
            **counts(encoded),
            "captions": len(captions),
            "image_to_text": "a hit if any caption of the picture is among the first k",
        }
        details = examples(image_features, text_features, rows, encoded.kept, captions, task.pictures)
        return Result(retrieval(image_features, text_features, rows), protocol, details)

    return judge


SCORERS: dict[type[Task], Callable[[Any, Subject], Judge]] = {
    ClassificationTask: score_classification,
    RetrievalTask: score_retrieval,
}


def encode_set(name: str, pictures: Any, subject: Subject) -> EncodedImages:
    """Features of a task's pictures."""
    return encode_pictures(
        subject.image_encoder(), pictures, subject.options, subject.cache, f"{name}: {len(pictures):,} pictures"
    )


def zero_shot_classifier(class_names: Sequence[str], templates: Sequence[str], subject: Subject) -> Tensor:
    """`build_classifier` with the subject's towers, the ranks sharing the prompts; from the cache where it is there."""
    device = subject.options.device

    def build() -> Tensor:
        return build_classifier(
            subject.model,
            subject.tokenizer,
            class_names,
            templates,
            TEXT_BATCH[device.type],
            device,
            what=f"{len(class_names):,} classes",
            shared=True,
        )

    return subject.kept_texts(class_names, build, templates=hash_of(templates))


def counts(encoded: EncodedImages) -> dict[str, Any]:
    """For a protocol: pictures that were scored and left out."""
    bad = encoded.bad
    return {"pictures": len(encoded.kept), "bad_pictures": len(bad), **({"bad": bad[:LISTED]} if bad else {})}


def _absolute(where: str) -> str:
    return str(Path(where).resolve()) if Path(where).exists() else where


def source_of(value: Any) -> Any:
    """For a protocol: what the configuration said, if it is short."""
    return value if isinstance(value, str) or len(value) <= LISTED else f"{len(value)} given"


def hash_of(lines: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
