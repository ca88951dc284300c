"""Features of a whole set of pictures: shared by the ranks, kept block by block, the same on any number of ranks.

A set is cut into blocks that depend on its size alone. A block is encoded by one rank, in batches of its own, so a picture's
batch, and with it every bit of its features, is the same whichever rank computes it; a block that is on disk is read.
"""

import json
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from clip_exp.config.data_schema import OnBadImage
from clip_exp.data.loader import (
    EvalBatch,
    EvalCollate,
    EvalImages,
    WorkerLoader,
    count_workers,
    killed_workers_are_told,
)
from clip_exp.data.pictures import Pictures
from clip_exp.errors import DataError
from clip_exp.evaluation.cache import Cache
from clip_exp.evaluation.encode import EncodeOptions, ImageEncoder
from clip_exp.progress import progress
from clip_exp.ranks.group import from_main, gather_objects, local_world_size, rank, world_size
from clip_exp.text.tokenizer import Tokenizer

BLOCKS = 64  # of a set: the most ranks that share it evenly
SMALLEST, LARGEST = 32, 1024  # pictures of a block


class EncodedImages(NamedTuple):
    """Features of the pictures that could be read."""

    features: Tensor  # [N, D] float32, on the CPU
    kept: Tensor  # [N] which of the given pictures, ascending
    bad: list[str]  # "path: reason" of each picture that was left out


class _Block(NamedTuple):
    features: Tensor
    kept: Tensor
    bad: list[str]


def encode_pictures(
    encoder: ImageEncoder,
    pictures: Pictures,
    options: EncodeOptions,
    cache: Cache | None = None,
    what: str | None = None,
) -> EncodedImages:
    """Read, transform and encode every picture once. Every rank calls, and gets all the features.

    Args:
        cache: where blocks are kept, if the encoder has an identity.
        what: name of the progress bar; None for none.
    Raises:
        DataError: a picture cannot be read and `on_bad_image` is `error`, or none can be read.
    """
    blocks = _blocks(len(pictures))
    store = _Store(cache, encoder, pictures, options, len(blocks[0]))
    mine = _share(len(blocks), from_main(store.numbers))
    found: dict[int, _Block] = {number: block for number in mine if (block := store.read(number)) is not None}
    for block in found.values():
        _check(block.bad, options)
    missing = {number: blocks[number] for number in mine if number not in found}
    total = sum(len(blocks[number]) for number in mine)
    with killed_workers_are_told("num_workers"), progress(total, what, len(pictures)) as advance:
        advance(sum(len(blocks[number]) for number in found))
        for number, block in _encode_blocks(encoder, pictures, options, missing, advance):
            store.write(number, block)
            found[number] = block
    everywhere = {number: block for share in gather_objects(found) for number, block in share.items()}
    ordered = [everywhere[number] for number in range(len(blocks))]
    bad = [reason for block in ordered for reason in block.bad]
    kept = torch.cat([block.kept for block in ordered])
    if not len(kept):
        raise DataError(f"none of the {len(pictures)} pictures can be read; the first: {bad[0]}.")
    return EncodedImages(torch.cat([block.features for block in ordered if len(block.kept)]), kept, bad)


def _blocks(pictures: int) -> list[range]:
    size = min(max(-(-pictures // BLOCKS), SMALLEST), LARGEST)
    return [range(start, min(start + size, pictures)) for start in range(0, pictures, size)]


def _share(blocks: int, kept: set[int]) -> list[int]:
    """The blocks of this rank: its share of those that are on disk, and of those that are not."""
    there = [number for number in range(blocks) if number in kept]
    missing = [number for number in range(blocks) if number not in kept]
    return there[rank() :: world_size()] + missing[rank() :: world_size()]


def _encode_blocks(
    encoder: ImageEncoder,
    pictures: Pictures,
    options: EncodeOptions,
    blocks: dict[int, range],
    advance: Callable[[int], None],
) -> Iterator[tuple[int, _Block]]:
    """Each block as soon as its last batch is encoded."""
    if not blocks:
        return
    batches = [
        (number, list(block[start : start + options.batch_size]))
        for number, block in blocks.items()
        for start in range(0, len(block), options.batch_size)
    ]
    waiting: list[_Block] = []
    for position, batch in enumerate(load_batches(encoder, pictures, options, [indices for _, indices in batches])):
        bad = [f"{picture.path}: {picture.reason}" for picture in batch.bad]
        _check(bad, options)
        features = encoder.encode(batch.image) if len(batch.index) else torch.empty(0, 0)
        waiting.append(_Block(features, batch.index, bad))
        advance(len(batch.index) + len(bad))
        number = batches[position][0]
        if position + 1 == len(batches) or batches[position + 1][0] != number:
            yield number, _join(waiting)
            waiting = []


def load_batches(
    encoder: ImageEncoder, pictures: Pictures, options: EncodeOptions, batches: list[list[int]]
) -> Iterator[EvalBatch]:
    """Pictures read and transformed by worker processes, in the given batches of positions; bad ones are passed on."""
    workers = count_workers(options.num_workers, local_world_size(), options.device.type)
    few = len(batches) == 1  # starting processes would take longer than the work
    return iter(
        WorkerLoader(
            EvalImages(pictures, encoder.transform, options.max_image_pixels),
            batch_bytes=3 * encoder.image_size**2 * max(map(len, batches)),
            batch_sampler=batches,
            collate_fn=EvalCollate(Tokenizer(), encoder.image_size),
            num_workers=0 if few else min(workers, len(batches)),
            pin_memory=options.device.type == "cuda",
            generator=torch.Generator(),  # the global one may be a training run's
        )
    )


def _join(parts: list[_Block]) -> _Block:
    """Return batches as one block, its features on the CPU: here the process waits for a GPU, not after every batch."""
    features = [part.features for part in parts if len(part.kept)]
    return _Block(
        torch.cat(features).cpu() if features else torch.empty(0, 0),
        torch.cat([part.kept for part in parts]),
        [reason for part in parts for reason in part.bad],
    )


def _check(bad: list[str], options: EncodeOptions) -> None:
    if bad and options.on_bad_image is OnBadImage.error:
        raise DataError(f"{bad[0]}. Repair or remove it, or leave such pictures out: on_bad_image=replace.")


class _Store:
    """The blocks of one set on disk; nothing where there is no cache."""

    def __init__(
        self, cache: Cache | None, encoder: ImageEncoder, pictures: Pictures, options: EncodeOptions, block: int
    ) -> None:
        self.cache = cache if encoder.identity is not None else None
        if self.cache is not None:
            self.entry = self.cache.entry(
                "features",
                encoder=encoder.identity,
                pictures=from_main(pictures.fingerprint),
                block=block,
                device=options.device.type,
                precision=options.precision,
                max_image_pixels=options.max_image_pixels,
            )

    def numbers(self) -> set[int]:
        """The blocks that are there."""
        names = set() if self.cache is None else self.cache.names(self.entry)
        return {int(name.removeprefix("block-")) for name in names}

    def read(self, number: int) -> _Block | None:
        if self.cache is None or (found := self.cache.read(self.entry, f"block-{number:04d}")) is None:
            return None
        tensors, metadata = found
        return _Block(tensors["features"], tensors["kept"], json.loads(metadata["bad"]))

    def write(self, number: int, block: _Block) -> None:
        if self.cache is not None:
            self.cache.write(
                self.entry,
                f"block-{number:04d}",
                {"features": block.features, "kept": block.kept},
                {"bad": json.dumps(block.bad)},
            )
