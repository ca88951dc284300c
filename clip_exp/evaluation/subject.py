"""What is evaluated, and what every task makes with it: features of images and texts, classifiers, parts of a protocol."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clip_exp._version import __version__
from clip_exp.config.base import plain
from clip_exp.config.evaluation import EvaluateConfig
from clip_exp.config.model import ModelConfig, ResizeMode
from clip_exp.data.image_sets import ImageSet
from clip_exp.data.images import eval_transform, preprocessing_of
from clip_exp.devices import exact_float32
from clip_exp.errors import DataError
from clip_exp.evaluation.classification import build_classifier
from clip_exp.evaluation.features import (
    Cache,
    EncodedImages,
    EncodeOptions,
    ImageEncoder,
    encode_images,
    encode_options,
    encode_pixels,
    encode_texts,
    require_finite,
)
from clip_exp.evaluation.task import LearnedTask, Task
from clip_exp.loading import ModelSource, load_model
from clip_exp.models.clip import CLIP
from clip_exp.ranks.group import from_main, is_main
from clip_exp.reports.evaluation import Result, write_result
from clip_exp.reports.names import name_in_run
from clip_exp.text.tokenizer import Tokenizes, build_tokenizer

TEXT_BATCH = {"cpu": 256, "cuda": 1024}  # texts encoded at a time: one costs a fraction of an image
LISTED = 100  # names written into a protocol
FEATURES = "of unit norm, as encode_image returns them"

Judge = Callable[[], Result]  # what remains of scoring after the encoding, for rank 0 alone


@dataclass(frozen=True)
class Subject:
    """What is evaluated, how its inputs are made, and where what it computed is kept."""

    model: CLIP
    tokenizer: Tokenizes
    config: ModelConfig
    options: EncodeOptions
    weights_sha256: str | None = None  # None: the weights change, and nothing is kept
    cache: Cache | None = None

    @property
    def identity(self) -> dict[str, Any] | None:
        """What decides this model's features, as JSON."""
        return None if self.weights_sha256 is None else {"weights": self.weights_sha256, "model": plain(self.config)}

    def image_encoder(self) -> ImageEncoder:
        wanted, options = preprocessing_of(self.config.image), self.options
        return ImageEncoder(
            encode=lambda pixels: encode_pixels(self.model, pixels, wanted, options.device, options.precision),
            transform=partial(
                eval_transform,
                size=wanted.size,
                interpolation=wanted.interpolation,
                resize_mode=wanted.resize_mode,
            ),
            image_size=wanted.size,
            identity=self.identity,
        )

    def preprocessing(self) -> dict[str, Any]:
        """For a protocol: what happens to an image before the image tower."""
        size, mean, std, interpolation, resize_mode = preprocessing_of(self.config.image)
        squash = resize_mode is ResizeMode.squash
        return {
            "resize": f"{'both sides' if squash else 'shorter side'} {size}, {interpolation}, Pillow",
            "crop": "none" if squash else f"center {size}",
            "mean": mean,
            "std": std,
        }

    def encode_images(self, name: str, images: ImageSet) -> EncodedImages:
        """Features of all images that can be read, from the cache where they are there. Every rank calls, and encodes a shard of them.

        Args:
            name: of the task, for the progress bar.
        """
        what = f"{name}: {len(images):,} images"
        return encode_images(self.image_encoder(), images, self.options, self.cache, what)

    def encode_texts(self, what: str, texts: Sequence[str]) -> Tensor:
        """Features [N, D] of texts, of unit norm, on the device; from the cache where they are there. Every rank calls.

        Args:
            what: name of the progress bar.
        """
        device = self.options.device

        def encode() -> Tensor:
            return encode_texts(self.model, self.tokenizer, texts, TEXT_BATCH[device.type], device, what, shared=True)

        return self._kept_texts(texts, encode)

    def classifier(self, class_names: Sequence[str], templates: Sequence[str]) -> Tensor:
        """`classification.build_classifier` [C, D] on the device, from the cache where it is there. Every rank calls."""
        device = self.options.device

        def build() -> Tensor:
            return build_classifier(
                self.model,
                self.tokenizer,
                class_names,
                templates,
                TEXT_BATCH[device.type],
                device,
                what=f"{len(class_names):,} classes",
                shared=True,
            )

        return self._kept_texts(class_names, build, templates=hash_of(templates))

    def _kept_texts(self, texts: Sequence[str], compute: Callable[[], Tensor], **about: Any) -> Tensor:
        """What `compute` makes of texts, from the cache where it is there. On the device. All ranks call.

        The tokenizer's count of cut texts rises as if they had been encoded.
        """
        device = self.options.device
        if self.cache is None or self.identity is None:
            return compute()
        cache, about = self.cache, {"model": self.identity, "texts": hash_of(texts), "device": device.type, **about}
        entry = cache.entry("texts", **about)
        found = from_main(lambda: cache.read(entry, "features"))
        if found is not None:
            tensors, metadata = found
            self.tokenizer.truncated += int(metadata["truncated"])
            return tensors["features"].to(device)
        before = self.tokenizer.truncated
        features = compute()
        metadata = {"truncated": str(self.tokenizer.truncated - before)}
        from_main(lambda: cache.write(entry, "features", {"features": features.cpu()}, metadata))
        return features


def counts(encoded: EncodedImages) -> dict[str, Any]:
    """For a protocol: images that were scored and left out."""
    bad = encoded.bad
    return {"images": len(encoded.kept), "bad_images": len(bad), **({"bad": bad[:LISTED]} if bad else {})}


def absolute(where: str) -> str:
    """For a protocol: a path that means the same elsewhere; what is no path stays."""
    return str(Path(where).resolve()) if Path(where).exists() else where


def source_of(value: Any) -> Any:
    """For a protocol: what the configuration said, if it is short."""
    return value if isinstance(value, str) or len(value) <= LISTED else f"{len(value)} given"


def hash_of(texts: Sequence[str]) -> str:
    """Of their JSON: texts may hold line breaks."""
    return hashlib.sha256(json.dumps(list(texts), ensure_ascii=False).encode()).hexdigest()


class Frozen(NamedTuple):
    """Features and labels of the images that could be read."""

    train: EncodedImages
    train_labels: Tensor  # int64 [N]
    test: EncodedImages
    test_labels: Tensor  # int64 [M]


def encode_halves(task: LearnedTask, subject: Subject) -> Frozen:
    """Features of the images to learn from and of those to score. Every rank calls, and gets all of them.

    Raises:
        DataError: no image of a class to learn from can be read.
        NumericError: a feature is not finite.
    """
    train = subject.encode_images(f"{task.name}: train", task.train.images)
    test = subject.encode_images(task.name, task.test.images)
    require_finite(train.features, "image features")
    require_finite(test.features, "image features")
    train_labels = torch.tensor(task.train.labels)[train.kept]
    count_C = torch.bincount(train_labels, minlength=len(task.train.class_names))
    if not count_C.all():
        name = task.train.class_names[int(count_C.argmin())]
        raise DataError(f"task.{task.name}.train: no image of '{name}' can be read; the first of all: {train.bad[0]}.")
    return Frozen(train, train_labels, test, torch.tensor(task.test.labels)[test.kept])


def protocol_of(task: LearnedTask, frozen: Frozen) -> dict[str, Any]:
    """The data of both halves, for a protocol."""
    test, names = task.test, task.test.class_names
    return {
        "data": absolute(test.where),
        **counts(frozen.test),
        "unlabeled_images": test.unlabeled,
        **test.about,
        "train": {
            "data": absolute(task.train.where),
            **counts(frozen.train),
            "unlabeled_images": task.train.unlabeled,
            **task.train.about,
        },
        "overlap": None if task.overlap is None else task.overlap.protocol(),
        "classes": len(names),
        "classes_source": source_of(task.labeled.classes),
        "classes_sha256": hash_of(names),
        "classes_without_images": len(test.missing),
        "names": dict(zip(task.train.keys, names, strict=True)) if len(names) <= LISTED else None,
        "features": FEATURES,
    }


def score_tasks(
    folder: Path, config: EvaluateConfig, source: ModelSource, tasks: list[Task], results: dict[str, dict[str, Any]]
) -> None:
    """Score one task after the other into `results`; what one of them found is written before the next begins."""
    subject, about = _load_subject(config, source)
    for task in tasks:
        result = score(task, subject)
        result.protocol.update(about)
        if is_main():
            # A mixture's scores are not the run's.
            run_dir = None if source.mix else source.run_dir
            write_result(result, task.name, folder, run_dir, name_in_run(task.name, source))
        results[task.name] = {"metrics": result.metrics, "protocol": result.protocol}
    if subject.cache is not None and is_main():
        subject.cache.prune()


def _load_subject(config: EvaluateConfig, source: ModelSource) -> tuple[Subject, dict[str, Any]]:
    options = encode_options(config)
    sha256 = from_main(source.sha256)
    about = about_weights(source, sha256, options.device)
    cache = Cache(Path(config.output_dir) / "cache", config.cache_gb) if config.cache_gb else None
    model = load_model(source, options.device)
    tokenizer = build_tokenizer(source.model.text)
    return Subject(model, tokenizer, source.model, options, sha256, cache), about


def about_weights(source: ModelSource, sha256: str, device: torch.device) -> dict[str, Any]:
    """For a protocol: which weights were scored, on which kind of device."""
    return {
        "model": source.model.name,
        "weights": str(source.weights.resolve()),
        "weights_sha256": sha256,
        **({} if source.description is None else {"pretrained": source.description}),
        **({} if source.mix is None else {"wise_ft": asdict(source.mix)}),
        "step": source.step,
        **({} if source.run_dir is None else {"ema": source.ema}),
        "device": device.type,
        "clip_exp": __version__,
    }


@exact_float32()  # scores too: towers see to it themselves
def score(task: Task, subject: Subject) -> Result:
    """Return the result of one task. Every rank calls and gets it; only rank 0's has details and files.

    Raises:
        DataError: an image cannot be read and `on_bad_image` is `error`, or none can be read.
        NumericError: features are not finite.
    """
    truncated = subject.tokenizer.truncated
    judge = task.score(subject)
    here: list[Result] = []

    def judged() -> Result:
        here.append(judge())
        return replace(here[0], details=None, files={})

    result = from_main(judged)
    common = {
        "truncated_texts": subject.tokenizer.truncated - truncated,
        "preprocessing": subject.preprocessing(),
        "precision": subject.options.precision,
        "kind": task.config.kind,
    }
    return replace(here[0] if here else result, protocol={**common, **result.protocol})
