"""Features of texts and images, of unit norm, and their cache on disk.

A dataset is divided into blocks that depend only on its size. A block is encoded by one rank in batches of its own. So the batch of an
image, and with it every bit of its features, does not depend on the number of ranks. Blocks in the cache are read, not computed.
"""

import hashlib
import json
import logging
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from clip_exp._version import __version__
from clip_exp.config.evaluation import EvalOnBadImage, InferenceConfig
from clip_exp.data.files import ImageLimits
from clip_exp.data.image_sets import ImageSet
from clip_exp.data.images import Preprocessing, normalize
from clip_exp.data.loader import (
    EvalBatch,
    EvalCollate,
    EvalImages,
    WorkerLoader,
    count_workers,
    report_killed_workers,
)
from clip_exp.data.reading import DEFAULT_LIMIT, ReadLimit
from clip_exp.devices import inference, inference_precision, resolve_accelerator
from clip_exp.errors import DataError, NumericError
from clip_exp.loading import ModelSource
from clip_exp.progress import progress
from clip_exp.ranks.group import from_main, gather_objects, local_world_size, rank, world_size
from clip_exp.storage import atomic_file
from clip_exp.text.prefixes import NODES, TreeLayout, grow, pack
from clip_exp.text.tokenizer import Tokenizer, Tokenizes

log = logging.getLogger(__name__)
EVALUATED = ImageLimits.evaluated()
BLOCKS = 64  # of a dataset: up to so many ranks get equal numbers of blocks
SMALLEST, LARGEST = 32, 1024  # images per block
IN_USE_S = 3600.0  # an entry used more recently may be in use by another process
SUFFIX = ".safetensors"
CHECKSUM = "crc32"


@dataclass(frozen=True)
class EncodeOptions:
    """Options for reading and encoding images: the fields of `InferenceConfig`, resolved."""

    device: torch.device
    precision: str = "32-true"  # 32-true, bf16-mixed, 16-mixed
    batch_size: int = 64
    num_workers: int | None = None
    on_bad_image: EvalOnBadImage = EvalOnBadImage.error
    limits: ImageLimits = EVALUATED
    read_limit: ReadLimit = DEFAULT_LIMIT  # longest wait for a worker that makes no progress
    skip_override: str = "on_bad_image=skip"  # override that leaves unreadable images out, for error messages


def encode_options(config: InferenceConfig, source: ModelSource) -> EncodeOptions:
    """Return the options of a command's configuration, with `auto` resolved to a device and a precision.

    Args:
        config: configuration of the command.
        source: source of the model, whose run may accept further formats.
    """
    device = torch.device(resolve_accelerator(config.accelerator))
    return EncodeOptions(
        device,
        inference_precision(config.precision, device.type),
        config.batch_size,
        config.num_workers,
        config.on_bad_image,
        source.image_limits(config.max_image_pixels),
    )


class TextModel(Protocol):
    def encode_text(self, tokens_BL: Tensor, normalize: bool = False) -> Tensor: ...


class ImageModel(Protocol):
    def encode_image(self, image_BCHW: Tensor, normalize: bool = False) -> Tensor: ...


@dataclass(frozen=True)
class ImageEncoder:
    """Function from images to vectors, with its preprocessing."""

    encode: Callable[[Tensor], Tensor]  # uint8 [B, 3, S, S] on the CPU to float32 [B, D]
    transform: Callable[[Image.Image], Tensor]  # an image to uint8 [3, S, S]; picklable
    image_size: int  # S
    identity: dict[str, object] | None = None  # JSON values that determine the vectors; None: they are not cached


def encode_texts(
    model: TextModel,
    tokenizer: Tokenizes,
    texts: Sequence[str],
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    what: str | None = None,
    shared: bool = False,
) -> Tensor:
    """Return features [N, D] of texts, float32, unit norm, on `device`. See `encode_distinct_texts`."""
    features_PD, index_N = encode_distinct_texts(model, tokenizer, texts, batch_size, device, what, shared)
    return features_PD[index_N]


def encode_distinct_texts(
    model: TextModel,
    tokenizer: Tokenizes,
    texts: Sequence[str],
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    what: str | None = None,
    shared: bool = False,
) -> tuple[Tensor, Tensor]:
    """Encode each distinct text once, in the precision of the weights, outside autocast.

    Models that support it compute each distinct prefix once as well (`clip_exp.text.prefixes`). For other models, texts of similar
    length share a batch, which is padded to the longest.

    Args:
        model: model with a text tower.
        tokenizer: tokenizer for the texts.
        texts: N texts, which may repeat.
        batch_size: number of texts encoded at a time.
        device: device of the model.
        what: name of the progress bar; None: no progress bar.
        shared: divide the work between the ranks, all of which must call.

    Returns:
        Features [P, D] of the distinct texts, float32, unit norm, on `device`, and the row [N] of each given text.
    """
    row = {text: position for position, text in enumerate(dict.fromkeys(texts))}
    tokens = tokenizer.encode_batch(list(row))
    groups: list[
        tuple[list[int], Callable[[], Tensor]]
    ]  # texts that are encoded together, and the function that does it
    if getattr(model, "shares_prefixes", False):
        trees = grow(tokens)
        size = max(1, batch_size * 5 // NODES)  # a prompt adds about five nodes to the trees

        def encode_trees(group: list[Any]) -> Tensor:
            tokens, *layout = (_send(part, device) for part in pack(group))
            return model.encode_text_trees(tokens, TreeLayout(*layout))  # type: ignore[attr-defined]

        groups = [
            ([text for tree in group for text in tree.texts], partial(encode_trees, group))
            for group in (trees[start : start + size] for start in range(0, len(trees), size))
        ]
    else:

        def encode(group: list[int]) -> Tensor:
            padded = tokenizer.pad([tokens[position] for position in group])
            return model.encode_text(_send(padded, device), normalize=True)

        order = sorted(range(len(tokens)), key=lambda position: len(tokens[position]))
        batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        groups = [(batch, partial(encode, batch)) for batch in batches]
    mine = groups[rank() :: world_size()] if shared else groups
    encoded = []
    with (
        inference("32-true", torch.device(device)),
        progress(sum(len(group) for group, _ in mine), what, len(tokens)) as advance,
    ):
        for group, encode_group in mine:
            encoded.append(encode_group().float())
            advance(len(group))
    positions = [position for group, _ in mine for position in group]
    if shared and world_size() > 1:
        ranks = gather_objects((positions, [features.cpu() for features in encoded]))
        positions = [position for of_rank, _ in ranks for position in of_rank]
        encoded = [features.to(device) for _, of_rank in ranks for features in of_rank]
    encoded_PD = torch.cat(encoded)
    features_PD = torch.empty_like(encoded_PD)
    features_PD[torch.tensor(positions, device=device)] = encoded_PD
    return features_PD, torch.tensor([row[text] for text in texts], device=device)


def _send(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Copy a tensor from the CPU to `device`. Pinned memory lets a GPU copy it while the next batch is prepared."""
    pinned = tensor.pin_memory() if torch.device(device).type == "cuda" else tensor
    return pinned.to(device, non_blocking=True)


def encode_pixels(
    model: ImageModel,
    pixels_BCHW: Tensor,
    preprocessing: Preprocessing,
    device: torch.device,
    precision: str = "32-true",
) -> Tensor:
    """Return features [B, D], float32, unit norm, of uint8 images after the evaluation transform."""
    image_BCHW = normalize(pixels_BCHW.to(device, non_blocking=True), preprocessing.mean, preprocessing.std)
    with inference(precision, device):
        return model.encode_image(image_BCHW, normalize=True).float()


def require_finite(features: Tensor, what: str) -> None:
    """Check that features are finite: comparisons with NaN are false, which would count as a perfect rank.

    Raises:
        NumericError: a value is NaN or infinite.
    """
    if not torch.isfinite(features.sum()):  # features are small: only a value that is not finite makes the sum so
        raise NumericError(
            f"The {what} contain NaN or infinite values: the weights are broken, or overflow in this precision."
        )


class Cache:
    """Cache on disk for features of images and texts, and for classifiers.

    An entry is a folder named by a hash of everything that its contents depend on, so entries are never out of date. Files are
    written atomically. Two processes that write the same file write the same contents. Errors of the cache never end an
    evaluation: missing contents are computed.

    Args:
        folder: folder of the cache, created with the first entry.
        limit_gb: size limit in GB; `prune` removes the least recently used entries above it.
    """

    def __init__(self, folder: Path, limit_gb: float) -> None:
        self.folder = folder
        self.limit_gb = limit_gb
        self._refused = False

    def entry(self, kind: str, **about: Any) -> Path:
        """Return the folder, which may not exist yet, of contents determined by `about` (JSON values) and the version."""
        text = json.dumps({"clip_exp": __version__, **about}, sort_keys=True)
        folder = self.folder / kind / hashlib.sha256(text.encode()).hexdigest()[:32]
        with suppress(OSError):  # it does not exist, or belongs to another user
            os.utime(folder)
        return folder

    def names(self, entry: Path) -> set[str]:
        """Return the names of the files in an entry."""
        return {path.name.removesuffix(SUFFIX) for path in entry.glob(f"*{SUFFIX}") if not path.name.startswith(".")}

    def read(self, entry: Path, name: str) -> tuple[dict[str, Tensor], dict[str, str]] | None:
        """Return the tensors and metadata of a file; None if it is missing or damaged."""
        path = entry / f"{name}{SUFFIX}"
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
                metadata = file.metadata() or {}
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError) as error:
            log.warning("%s cannot be read (%s) and is computed again.", path, error)
            return None
        if metadata.pop(CHECKSUM, None) != _checksum(tensors):
            log.warning("%s has a wrong checksum and is computed again.", path)
            return None
        return tensors, metadata

    def write(self, entry: Path, name: str, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
        """Write CPU tensors. If the disk is full or read-only, log one warning and write nothing from then on."""
        if self._refused:
            return
        tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
        try:
            entry.mkdir(parents=True, exist_ok=True)
            # The checksum detects files that a power failure damaged.
            with atomic_file(entry / f"{name}{SUFFIX}", durable=False) as temporary:
                save_file(tensors, temporary, {**(metadata or {}), CHECKSUM: _checksum(tensors)})
        except (OSError, SafetensorError) as error:
            self._refused = True
            log.warning(
                "features cannot be cached in %s (%s): an interrupted evaluation would start over.", self.folder, error
            )

    def prune(self) -> None:
        """Remove the least recently used entries above the limit, except those used within the last hour."""
        entries: list[tuple[float, int, Path]] = []  # time of last use, bytes
        for folder in self.folder.glob("*/*/"):
            with suppress(OSError):  # another process has just removed it
                used, size = folder.stat().st_mtime, 0
                for path in folder.iterdir():
                    status = path.stat()
                    if path.name.startswith(".") and time.time() - status.st_mtime > IN_USE_S:
                        path.unlink(missing_ok=True)  # left behind by a killed process
                        os.utime(folder, (used, used))
                    else:
                        size += status.st_size
                entries.append((used, size, folder))
        total = sum(size for _, size, _ in entries)
        for used, size, folder in sorted(entries):
            if total <= self.limit_gb * 1e9:
                return
            if time.time() - used > IN_USE_S:
                shutil.rmtree(folder, ignore_errors=True)
                total -= size


def _checksum(tensors: dict[str, Tensor]) -> str:
    checksum = 0
    for _, tensor in sorted(tensors.items()):
        checksum = zlib.crc32(tensor.numpy(), checksum)  # type: ignore[arg-type]
    return f"{checksum:08x}"


class EncodedImages(NamedTuple):
    """Features of the images that could be read."""

    features: Tensor  # [N, D] float32, on the CPU
    kept: Tensor  # [N] positions of these images, ascending
    bad: list[str]  # "path: reason" of each image that could not be read
    limits: ImageLimits = EVALUATED  # with which they were read


def encode_images(
    encoder: ImageEncoder,
    images: ImageSet,
    options: EncodeOptions,
    cache: Cache | None = None,
    what: str | None = None,
) -> EncodedImages:
    """Read, transform and encode every image once. All ranks must call, and get all features.

    Args:
        encoder: encoder of the images.
        images: images to encode.
        options: options for reading and encoding.
        cache: cache for the blocks, which is used if the encoder has an identity.
        what: name of the progress bar; None: no progress bar.

    Raises:
        DataError: an image cannot be read and `on_bad_image` is `error`, or none can be read.
    """
    size = min(max(-(-len(images) // BLOCKS), SMALLEST), LARGEST)
    blocks = [range(start, min(start + size, len(images))) for start in range(0, len(images), size)]
    store = _Store(cache, encoder, images, options, len(blocks[0]))
    stored = from_main(store.numbers)
    cached = [number for number in range(len(blocks)) if number in stored]
    uncached = [number for number in range(len(blocks)) if number not in stored]
    # This rank's part of the cached blocks, and of the others.
    mine = cached[rank() :: world_size()] + uncached[rank() :: world_size()]
    found: dict[int, EncodedImages] = {number: block for number in mine if (block := store.read(number)) is not None}
    for block in found.values():
        _refuse_bad(block.bad, options)
    missing = {number: blocks[number] for number in mine if number not in found}
    total = sum(len(blocks[number]) for number in mine)
    with report_killed_workers("num_workers"), progress(total, what, len(images)) as advance:
        advance(sum(len(blocks[number]) for number in found))
        for number, block in encode_blocks(encoder, images, options, missing, advance):
            store.write(number, block)
            found[number] = block
    everywhere = {number: block for of_rank in gather_objects(found) for number, block in of_rank.items()}
    whole = _join([everywhere[number] for number in range(len(blocks))])
    if not len(whole.kept):
        raise DataError(f"none of the {len(images)} images can be read; the first: {whole.bad[0]}.")
    return whole._replace(limits=options.limits)


class _Store:
    """Cached blocks of one dataset; empty without a cache."""

    def __init__(
        self, cache: Cache | None, encoder: ImageEncoder, images: ImageSet, options: EncodeOptions, block: int
    ) -> None:
        self.cache = cache if encoder.identity is not None else None
        if self.cache is not None:
            self.entry = self.cache.entry(
                "features",
                encoder=encoder.identity,
                images=from_main(images.fingerprint),
                block=block,
                device=options.device.type,
                precision=options.precision,
                max_image_pixels=options.limits.max_pixels,
                max_image_bytes=options.limits.max_bytes,
                image_formats=sorted(options.limits.formats),
            )

    def numbers(self) -> set[int]:
        """Return the numbers of the cached blocks."""
        names = set() if self.cache is None else self.cache.names(self.entry)
        return {int(name.removeprefix("block-")) for name in names}

    def read(self, number: int) -> EncodedImages | None:
        if self.cache is None or (found := self.cache.read(self.entry, f"block-{number:04d}")) is None:
            return None
        tensors, metadata = found
        return EncodedImages(tensors["features"], tensors["kept"], json.loads(metadata["bad"]))

    def write(self, number: int, block: EncodedImages) -> None:
        if self.cache is not None:
            self.cache.write(
                self.entry,
                f"block-{number:04d}",
                {"features": block.features, "kept": block.kept},
                {"bad": json.dumps(block.bad)},
            )


def encode_blocks(
    encoder: ImageEncoder,
    images: ImageSet,
    options: EncodeOptions,
    blocks: dict[int, range],
    advance: Callable[[int], None],
) -> Iterator[tuple[int, EncodedImages]]:
    """Yield each block as soon as its last batch is encoded. The images of all blocks are read by the same workers.

    Args:
        encoder: encoder of the images.
        images: images of all blocks.
        options: options for reading and encoding.
        blocks: positions of the images of each block, by number.
        advance: called with the number of images done since the last call.

    Raises:
        DataError: an image cannot be read and `on_bad_image` is `error`.
    """
    if not blocks:
        return
    batches = [
        (number, list(block[start : start + options.batch_size]))
        for number, block in blocks.items()
        for start in range(0, len(block), options.batch_size)
    ]
    waiting: list[EncodedImages] = []  # features are still on the device
    for position, batch in enumerate(load_batches(encoder, images, options, [indices for _, indices in batches])):
        bad = [f"{image.path}: {image.reason}" for image in batch.bad]
        _refuse_bad(bad, options)
        features = encoder.encode(batch.image) if len(batch.index) else torch.empty(0, 0)
        waiting.append(EncodedImages(features, batch.index, bad))
        advance(len(batch.index) + len(bad))
        number = batches[position][0]
        if position + 1 == len(batches) or batches[position + 1][0] != number:
            yield number, _join(waiting)
            waiting = []


def load_batches(
    encoder: ImageEncoder, images: ImageSet, options: EncodeOptions, batches: list[list[int]]
) -> Iterator[EvalBatch]:
    """Return an iterator over batches of images that worker processes read and transform; unreadable images are passed on.

    Args:
        encoder: encoder with the transform.
        images: images to read.
        options: options for reading.
        batches: positions of the images of each batch.
    """
    workers = count_workers(options.num_workers, local_world_size(), options.device.type)
    few = len(batches) == 1  # starting processes would take longer than reading one batch
    return iter(
        WorkerLoader(
            EvalImages(images, encoder.transform, options.limits),
            limit=options.read_limit,
            batch_bytes=3 * encoder.image_size**2 * max(map(len, batches)),
            batch_sampler=batches,
            collate_fn=EvalCollate(Tokenizer(), encoder.image_size),
            num_workers=0 if few else min(workers, len(batches)),
            pin_memory=options.device.type == "cuda",
            generator=torch.Generator(),  # the global one may be in use by training
        )
    )


def _join(parts: list[EncodedImages]) -> EncodedImages:
    """Join batches to a block, or blocks to the dataset, on the CPU. The process waits for the GPU only here."""
    features = [part.features for part in parts if len(part.kept)]
    return EncodedImages(
        torch.cat(features).cpu() if features else torch.empty(0, 0),
        torch.cat([part.kept for part in parts]),
        [reason for part in parts for reason in part.bad],
    )


def _refuse_bad(bad: list[str], options: EncodeOptions) -> None:
    if bad and options.on_bad_image is EvalOnBadImage.error:
        raise DataError(f"{bad[0]}. Repair or remove it, or leave such images out: {options.skip_override}.")
