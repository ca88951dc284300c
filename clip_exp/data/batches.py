"""What the loaders yield, and how samples become it."""

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import default_collate

from clip_exp.text.build import Tokenizes


class BadPicture(NamedTuple):
    """A picture that could not be used."""

    path: str  # as it is written in the table
    reason: str


class Batch(NamedTuple):
    """A training batch of one rank.

    Equal captions have equal `caption_id`, equal pictures equal `image_id`, on every rank.
    """

    image: Tensor  # uint8 [B, 3, S, S], in memory [B, S, S, 3]
    tokens: Tensor  # int64 [B, L], padded by the tokenizer
    caption_id: Tensor  # int64 [B]
    image_id: Tensor  # int64 [B]
    bad: tuple[BadPicture, ...] = ()  # pictures that were replaced on the way to this batch
    truncated: int = 0  # captions that were cut to the context length


class EvalBatch(NamedTuple):
    """A validation batch of one rank: B pictures with all their captions, T in total."""

    index: Tensor  # type: ignore[assignment]  # int64 [B], which picture of the validation set
    image: Tensor  # uint8 [B, 3, S, S]
    tokens: Tensor  # int64 [T, L]
    caption_image: Tensor  # int64 [T], the picture that a caption belongs to, as in `index`
    caption_index: Tensor  # int64 [T], which caption of the validation set
    caption_id: Tensor  # int64 [T], equal for equal captions
    label: Tensor  # int64 [B], index of the class, -1 without one
    bad: tuple[BadPicture, ...] = ()  # pictures that were left out


@dataclass(frozen=True)
class Sample:
    """A training sample; `image` uint8 [3, S, S], in memory [S, S, 3]."""

    image: Tensor
    tokens: list[int]
    caption_id: int
    image_id: int
    bad: tuple[BadPicture, ...] = ()
    truncated: bool = False


@dataclass(frozen=True)
class EvalSample:
    """A validation picture, uint8 [3, S, S], with its captions; None for a picture that was left out."""

    index: int
    image: Tensor | None
    token_lists: list[list[int]]
    caption_indices: list[int]
    label: int
    bad: tuple[BadPicture, ...] = ()


@dataclass(frozen=True)
class Collate:
    """Samples to a `Batch`; captions are padded by the tokenizer, to a multiple of `multiple` where it may choose."""

    tokenizer: Tokenizes
    multiple: int = 1

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        return Batch(
            image=stack([sample.image.permute(1, 2, 0) for sample in samples]).permute(0, 3, 1, 2),
            tokens=self.tokenizer.pad([sample.tokens for sample in samples], self.multiple),
            caption_id=_int64(sample.caption_id for sample in samples),
            image_id=_int64(sample.image_id for sample in samples),
            bad=tuple(bad for sample in samples for bad in sample.bad),
            truncated=sum(sample.truncated for sample in samples),
        )


@dataclass(frozen=True)
class EvalCollate:
    """Samples to an `EvalBatch`, pictures that were left out not counted; it may hold none at all."""

    tokenizer: Tokenizes
    image_size: int
    multiple: int = 1

    def __call__(self, samples: Sequence[EvalSample]) -> EvalBatch:
        good = [sample for sample in samples if sample.image is not None]
        images = [sample.image for sample in good if sample.image is not None]
        token_lists = [tokens for sample in good for tokens in sample.token_lists]
        return EvalBatch(
            index=_int64(sample.index for sample in good),
            image=stack(images) if images else torch.empty(0, 3, self.image_size, self.image_size, dtype=torch.uint8),
            tokens=self.tokenizer.pad(token_lists, self.multiple),
            caption_image=_int64(sample.index for sample in good for _ in sample.token_lists),
            caption_index=_int64(index for sample in good for index in sample.caption_indices),
            caption_id=_int64(caption_id(tokens) for tokens in token_lists),
            label=_int64(sample.label for sample in good),
            bad=tuple(bad for sample in samples for bad in sample.bad),
        )


def stack(images: list[Tensor]) -> Tensor:
    """Stack images; a worker process does so in the memory that it shares with training, which saves a copy of the batch."""
    return default_collate(images)


def caption_id(tokens: Sequence[int]) -> int:
    """A hash of what the model sees of a caption, int64, the same in every process."""
    return int.from_bytes(blake2b(array("i", tokens).tobytes(), digest_size=8).digest(), "little", signed=True)


def _int64(values: Iterable[int]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int64)
