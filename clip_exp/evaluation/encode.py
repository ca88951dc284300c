"""From pictures and texts to features, each once, in large batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from clip_exp.config.schema import ImageTowerConfig, OnBadImage
from clip_exp.data.batches import EvalCollate
from clip_exp.data.dataset import EvalImages
from clip_exp.data.transforms import normalize
from clip_exp.data.workers import count_workers, init_worker
from clip_exp.errors import DataError
from clip_exp.evaluation.progress import progress
from clip_exp.inference.loading import autocast
from clip_exp.text.tokenizer import pad_tokens


class TextEncoder(Protocol):
    def encode_text(self, tokens_BL: Tensor, normalize: bool = False) -> Tensor: ...


class ImageEncoder(Protocol):
    def encode_image(self, image_BCHW: Tensor, normalize: bool = False) -> Tensor: ...


class Tokenizes(Protocol):
    context_length: int

    def encode_batch(self, texts: list[str]) -> list[list[int]]: ...


@dataclass(frozen=True)
class EncodeOptions:
    """How pictures are read and encoded; the fields of `EvaluateConfig`, resolved."""

    device: torch.device
    precision: str = "32-true"  # 32-true, bf16-mixed, 16-mixed
    batch_size: int = 64
    num_workers: int | None = None
    on_bad_image: OnBadImage = OnBadImage.error
    max_image_pixels: int = 200_000_000


class EncodedImages(NamedTuple):
    """Features of the pictures that could be read."""

    features: Tensor  # [N, D] float32, unit norm, on the CPU
    kept: Tensor  # [N] which of the given pictures, ascending
    bad: list[str]  # "path: reason" of each picture that was left out


def encode_distinct_texts(
    model: TextEncoder,
    tokenizer: Tokenizes,
    texts: Sequence[str],
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    what: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Encode each distinct text once, in batches of similar length that are padded no further than their longest.

    The text tower is causal and pooled at the end-of-text token, so shorter padding changes only the time it takes.
    Runs outside autocast.

    Args:
        what: name of the progress bar; None for none.
    Returns:
        features [P, D] float32 of unit norm, on `device`, and the row [N] of each given text.
    """
    row = {text: position for position, text in enumerate(dict.fromkeys(texts))}
    tokens = tokenizer.encode_batch(list(row))
    order = sorted(range(len(tokens)), key=lambda position: len(tokens[position]))
    features: list[Tensor] = []
    with torch.no_grad(), autocast("32-true", torch.device(device)), progress(len(order), what) as advance:
        for start in range(0, len(order), batch_size):
            batch = [tokens[position] for position in order[start : start + batch_size]]
            padded = pad_tokens(batch, tokenizer.context_length).to(device, non_blocking=True)
            features.append(model.encode_text(padded, normalize=True).float())
            advance(len(batch))
        by_length = torch.cat(features)
        features_PD = torch.empty_like(by_length)
        features_PD[torch.tensor(order, device=by_length.device)] = by_length
    return features_PD, torch.tensor([row[text] for text in texts], device=features_PD.device)


def encode_texts(
    model: TextEncoder,
    tokenizer: Tokenizes,
    texts: Sequence[str],
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    what: str | None = None,
) -> Tensor:
    """[N, D] float32 of unit norm, on `device`; equal texts have equal features. See `encode_distinct_texts`."""
    features_PD, index_N = encode_distinct_texts(model, tokenizer, texts, batch_size, device, what)
    return features_PD[index_N]


def encode_pixels(
    model: ImageEncoder, pixels_BCHW: Tensor, tower: ImageTowerConfig, device: torch.device, precision: str = "32-true"
) -> Tensor:
    """[B, D] float32 of unit norm, of uint8 pictures that went through the evaluation transform."""
    image_BCHW = normalize(pixels_BCHW.to(device, non_blocking=True), tower.mean, tower.std)
    with torch.no_grad(), autocast(precision, device):
        return model.encode_image(image_BCHW, normalize=True).float()


def encode_images(
    model: ImageEncoder,
    paths: Sequence[str],
    tower: ImageTowerConfig,
    options: EncodeOptions,
    what: str | None = None,
) -> EncodedImages:
    """Read, transform and encode picture files.

    Args:
        tower: size, mean and standard deviation that the model expects.
        what: name of the progress bar; None for none.
    Raises:
        DataError: a picture cannot be read and `on_bad_image` is `error`, or none can be read.
    """
    # Unreadable pictures are always passed on: an error raised in a worker would arrive with the worker's traceback.
    pictures = EvalImages(
        paths, tower.image_size, on_bad_image=OnBadImage.replace, max_image_pixels=options.max_image_pixels
    )
    loader = DataLoader(
        pictures,
        batch_size=options.batch_size,
        collate_fn=EvalCollate(context_length=1, image_size=tower.image_size),
        num_workers=_workers(options, len(paths)),
        worker_init_fn=init_worker,
        pin_memory=options.device.type == "cuda",
    )
    features, kept, bad = [], [], []
    with progress(len(paths), what) as advance:
        for batch in loader:
            bad += [f"{picture.path}: {picture.reason}" for picture in batch.bad]
            if bad and options.on_bad_image is OnBadImage.error:
                raise DataError(f"{bad[0]}. Repair or remove it, or leave such pictures out: on_bad_image=replace.")
            if len(batch.index):
                features.append(encode_pixels(model, batch.image, tower, options.device, options.precision).cpu())
                kept.append(batch.index)
            advance(len(batch.index) + len(batch.bad))
    if not features:
        raise DataError(f"none of the {len(paths)} pictures can be read; the first: {bad[0]}.")
    return EncodedImages(torch.cat(features), torch.cat(kept), bad)


def _workers(options: EncodeOptions, pictures: int) -> int:
    """Processes that decode: none for a set of one batch, where starting them takes longer than the work."""
    return 0 if pictures <= options.batch_size else count_workers(options.num_workers, 1)
