"""What is evaluated, and what every scorer makes with it: features of pictures and texts, parts of a protocol."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from clip_exp.config.base import plain
from clip_exp.config.model import ModelConfig, ResizeMode
from clip_exp.data.images import eval_transform, preprocessing_of
from clip_exp.data.pictures import Pictures
from clip_exp.evaluation.features import (
    Cache,
    EncodedImages,
    EncodeOptions,
    ImageEncoder,
    encode_pictures,
    encode_pixels,
)
from clip_exp.models.clip import CLIP
from clip_exp.ranks.group import from_main
from clip_exp.reports.evaluation import Result
from clip_exp.text.tokenizer import Tokenizes

TEXT_BATCH = {"cpu": 256, "cuda": 1024}  # texts encoded at a time: one costs a fraction of a picture
LISTED = 100  # names written into a protocol

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
        """For a protocol: what happens to a picture before the image tower."""
        size, mean, std, interpolation, resize_mode = preprocessing_of(self.config.image)
        squash = resize_mode is ResizeMode.squash
        return {
            "resize": f"{'both sides' if squash else 'shorter side'} {size}, {interpolation}, Pillow",
            "crop": "none" if squash else f"center {size}",
            "mean": mean,
            "std": std,
        }

    def kept_texts(self, texts: Sequence[str], compute: Callable[[], Tensor], **about: Any) -> Tensor:
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


def encode_set(name: str, pictures: Pictures, subject: Subject) -> EncodedImages:
    """Features of a task's pictures."""
    return encode_pictures(
        subject.image_encoder(), pictures, subject.options, subject.cache, f"{name}: {len(pictures):,} pictures"
    )


def counts(encoded: EncodedImages) -> dict[str, Any]:
    """For a protocol: pictures that were scored and left out."""
    bad = encoded.bad
    return {"pictures": len(encoded.kept), "bad_pictures": len(bad), **({"bad": bad[:LISTED]} if bad else {})}


def absolute(where: str) -> str:
    """For a protocol: a path that means the same elsewhere; what is no path stays."""
    return str(Path(where).resolve()) if Path(where).exists() else where


def source_of(value: Any) -> Any:
    """For a protocol: what the configuration said, if it is short."""
    return value if isinstance(value, str) or len(value) <= LISTED else f"{len(value)} given"


def hash_of(texts: Sequence[str]) -> str:
    """Of their JSON: texts may hold line breaks."""
    return hashlib.sha256(json.dumps(list(texts), ensure_ascii=False).encode()).hexdigest()
