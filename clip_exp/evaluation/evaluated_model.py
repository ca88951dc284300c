"""Model under evaluation: features, classifiers and evaluation settings that tasks need, and the scoring of tasks."""

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
from clip_exp.data.image_sets import ImageFiles, ImageSet
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

TEXT_BATCH = {"cpu": 256, "cuda": 1024}  # texts encoded at a time; a text is much cheaper than an image
LISTED = 100  # most names or images that evaluation settings list
FEATURES = "output of encode_image, unit norm"

ComputeResult = Callable[[], Result]  # the part of scoring after the encoding, which only rank 0 runs


@dataclass(frozen=True)
class EvaluatedModel:
    """Model under evaluation, with its tokenizer, options for reading images, and cache."""

    model: CLIP
    tokenizer: Tokenizes
    config: ModelConfig
    options: EncodeOptions
    weights_sha256: str | None = None  # None: the weights change, so nothing is cached
    cache: Cache | None = None

    @property
    def identity(self) -> dict[str, Any] | None:
        """JSON values that determine the features of the model; None if its weights change."""
        return None if self.weights_sha256 is None else {"weights": self.weights_sha256, "model": plain(self.config)}

    def image_encoder(self) -> ImageEncoder:
        """Return the image tower with its preprocessing."""
        preprocessing, options = preprocessing_of(self.config.image), self.options
        return ImageEncoder(
            encode=lambda pixels: encode_pixels(self.model, pixels, preprocessing, options.device, options.precision),
            transform=partial(
                eval_transform,
                size=preprocessing.size,
                interpolation=preprocessing.interpolation,
                resize_mode=preprocessing.resize_mode,
            ),
            image_size=preprocessing.size,
            identity=self.identity,
        )

    def preprocessing(self) -> dict[str, Any]:
        """Return the preprocessing of images for the evaluation settings."""
        size, mean, std, interpolation, resize_mode = preprocessing_of(self.config.image)
        squash = resize_mode is ResizeMode.squash
        return {
            "resize": f"{'both sides' if squash else 'shorter side'} {size}, {interpolation}, Pillow",
            "crop": "none" if squash else f"center {size}",
            "mean": mean,
            "std": std,
        }

    def encode_images(self, name: str, images: ImageSet | Sequence[str | Path]) -> EncodedImages:
        """Return the features of all readable images, from the cache if possible. All ranks must call, and encode a part each.

        Args:
            name: name of the task, for the progress bar.
            images: images to encode, or their paths.
        """
        if isinstance(images, Sequence):
            images = ImageFiles(images)
        what = f"{name}: {len(images):,} images"
        return encode_images(self.image_encoder(), images, self.options, self.cache, what)

    def encode_texts(self, what: str, texts: Sequence[str]) -> Tensor:
        """Return features [N, D] of texts, unit norm, on the device, from the cache if possible. All ranks must call.

        Args:
            what: name of the progress bar.
            texts: N texts.
        """
        device = self.options.device

        def encode() -> Tensor:
            return encode_texts(self.model, self.tokenizer, texts, TEXT_BATCH[device.type], device, what, shared=True)

        return self._cached(texts, encode)

    def classifier(self, class_names: Sequence[str], templates: Sequence[str]) -> Tensor:
        """Return `classification.build_classifier` [C, D] on the device, from the cache if possible. All ranks must call."""
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

        return self._cached(class_names, build, templates=hash_of(templates))

    def _cached(self, texts: Sequence[str], compute: Callable[[], Tensor], **about: Any) -> Tensor:
        """Return the output of `compute` for texts on the device, from the cache if possible. All ranks must call.

        The tokenizer's count of truncated texts rises as if the texts had been encoded.

        Args:
            texts: texts that the output depends on.
            compute: function that computes the output.
            about: further JSON values that the output depends on.
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
    """Return the numbers of evaluated and unreadable images for the evaluation settings."""
    bad = encoded.bad
    return {"images": len(encoded.kept), "bad_images": len(bad), **({"bad": bad[:LISTED]} if bad else {})}


def absolute(where: str) -> str:
    """Return an existing path as an absolute path; other strings unchanged."""
    return str(Path(where).resolve()) if Path(where).exists() else where


def source_of(value: Any) -> Any:
    """Return a value of the configuration for the evaluation settings: the value itself if it is short, else its length."""
    return value if isinstance(value, str) or len(value) <= LISTED else f"{len(value)} given"


def hash_of(texts: Sequence[str]) -> str:
    """Return the SHA-256 of texts, of their JSON since texts may contain line breaks."""
    return hashlib.sha256(json.dumps(list(texts), ensure_ascii=False).encode()).hexdigest()


class FrozenFeatures(NamedTuple):
    """Features and labels of the readable training and test images of a task."""

    train: EncodedImages
    train_labels: Tensor  # int64 [N]
    test: EncodedImages
    test_labels: Tensor  # int64 [M]


def encode_train_and_test(task: LearnedTask, model: EvaluatedModel) -> FrozenFeatures:
    """Return the features of the training and test images of a task. All ranks must call, and get all features.

    Raises:
        DataError: no training image of a class can be read.
        NumericError: a feature is not finite.
    """
    train = model.encode_images(f"{task.name}: train", task.train.images)
    test = model.encode_images(task.name, task.test.images)
    require_finite(train.features, "image features")
    require_finite(test.features, "image features")
    train_labels = torch.tensor(task.train.labels)[train.kept]
    count_C = torch.bincount(train_labels, minlength=len(task.train.class_names))
    if not count_C.all():
        name = task.train.class_names[int(count_C.argmin())]
        raise DataError(
            f"task.{task.name}.train: no image of class '{name}' can be read. First unreadable image: {train.bad[0]}."
        )
    return FrozenFeatures(train, train_labels, test, torch.tensor(task.test.labels)[test.kept])


def protocol_of(task: LearnedTask, frozen: FrozenFeatures) -> dict[str, Any]:
    """Return the evaluation settings about the training and test images of a task."""
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
    """Score tasks one after the other; the result of a task is written and added to `results` before the next task starts."""
    model, about = _load(config, source)
    for task in tasks:
        result = score(task, model)
        result.protocol.update(about)
        if is_main():
            # Interpolated weights are not those of the run.
            run_dir = None if source.mix else source.run_dir
            write_result(result, task.name, folder, run_dir, name_in_run(task.name, source))
        results[task.name] = {"metrics": result.metrics, "protocol": result.protocol}
    if model.cache is not None and is_main():
        model.cache.prune()


def _load(config: EvaluateConfig, source: ModelSource) -> tuple[EvaluatedModel, dict[str, Any]]:
    options = encode_options(config, source)
    sha256 = from_main(source.sha256)
    about = about_weights(source, sha256, options.device)
    cache = Cache(Path(config.output_dir) / "cache", config.cache_gb) if config.cache_gb else None
    model = load_model(source, options.device)
    tokenizer = build_tokenizer(source.model.text)
    return EvaluatedModel(model, tokenizer, source.model, options, sha256, cache), about


def about_weights(source: ModelSource, sha256: str, device: torch.device) -> dict[str, Any]:
    """Return the evaluation settings about the weights and the device."""
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


@exact_float32()  # for the scores; towers do so themselves
def score(task: Task, model: EvaluatedModel) -> Result:
    """Return the result of a task. All ranks must call; only the result on rank 0 has details and files.

    Raises:
        DataError: an image cannot be read and `on_bad_image` is `error`, or none can be read.
        NumericError: features are not finite.
    """
    truncated = model.tokenizer.truncated
    compute_result = task.score(model)
    here: list[Result] = []

    def result_to_send() -> Result:
        here.append(compute_result())
        return replace(here[0], details=None, files={})

    result = from_main(result_to_send)
    common = {
        "truncated_texts": model.tokenizer.truncated - truncated,
        "preprocessing": model.preprocessing(),
        "precision": model.options.precision,
        "kind": task.config.kind,
    }
    return replace(here[0] if here else result, protocol={**common, **result.protocol})
