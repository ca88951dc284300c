"""From texts and pictures to features of unit norm: the towers, run on large batches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from PIL import Image
from torch import Tensor

from clip_exp.config.data_schema import OnBadImage
from clip_exp.config.evaluation_schema import SubjectConfig
from clip_exp.data.images import Preprocessing, normalize
from clip_exp.devices import resolve_accelerator
from clip_exp.models.text import TreeLayout
from clip_exp.precision import inference, inference_precision
from clip_exp.progress import progress
from clip_exp.ranks.group import gather_objects, rank, world_size
from clip_exp.text.build import Tokenizes
from clip_exp.text.prefixes import NODES, TokenTrees, grow, pack


class TextModel(Protocol):
    def encode_text(self, tokens_BL: Tensor, normalize: bool = False) -> Tensor: ...


class ImageModel(Protocol):
    def encode_image(self, image_BCHW: Tensor, normalize: bool = False) -> Tensor: ...


@dataclass(frozen=True)
class EncodeOptions:
    """How pictures are read and encoded; the fields of `SubjectConfig`, resolved."""

    device: torch.device
    precision: str = "32-true"  # 32-true, bf16-mixed, 16-mixed
    batch_size: int = 64
    num_workers: int | None = None
    on_bad_image: OnBadImage = OnBadImage.error
    max_image_pixels: int = 200_000_000


def encode_options(config: SubjectConfig) -> EncodeOptions:
    """How a command's configuration reads and encodes pictures, with device and precision chosen.

    Raises:
        ConfigError: no such accelerator here.
    """
    device = torch.device(resolve_accelerator(config.accelerator))
    return EncodeOptions(
        device,
        inference_precision(config.precision, device.type),
        config.batch_size,
        config.num_workers,
        config.on_bad_image,
        config.max_image_pixels,
    )


@dataclass(frozen=True)
class ImageEncoder:
    """Anything that turns pictures into vectors."""

    encode: Callable[[Tensor], Tensor]  # uint8 [B, 3, S, S] on the CPU -> float32 [B, D]
    transform: Callable[[Image.Image], Tensor]  # a picture to uint8 [3, S, S]; picklable
    image_size: int  # S
    identity: dict[str, object] | None = None  # what decides the vectors, as JSON; None: they are not kept


class _Share(NamedTuple):
    """Texts that are encoded together."""

    texts: list[int]
    encode: Callable[[], Tensor]


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

    Where the model can, each distinct beginning is computed once too (`clip_exp.text.prefixes`); elsewhere texts of similar
    length share a batch, padded no further than the longest.

    Args:
        batch_size: texts encoded at a time.
        what: name of the progress bar; None for none.
        shared: the ranks divide the work; all of them must call.
    Returns:
        features [P, D] float32 of unit norm, on `device`, and the row [N] of each given text.
    """
    row = {text: position for position, text in enumerate(dict.fromkeys(texts))}
    tokens = tokenizer.encode_batch(list(row))
    if getattr(model, "shares_prefixes", False):
        shares = _trees(model, tokens, batch_size, device)
    else:
        shares = _batches(model, tokens, tokenizer, batch_size, device)
    mine = shares[rank() :: world_size()] if shared else shares
    encoded = []
    with (
        inference("32-true", torch.device(device)),
        progress(sum(len(share.texts) for share in mine), what, len(tokens)) as advance,
    ):
        for share in mine:
            encoded.append(share.encode().float())
            advance(len(share.texts))
    positions = [position for share in mine for position in share.texts]
    if shared and world_size() > 1:
        ranks = gather_objects((positions, [features.cpu() for features in encoded]))
        positions = [position for of_rank, _ in ranks for position in of_rank]
        encoded = [features.to(device) for _, of_rank in ranks for features in of_rank]
    encoded_PD = torch.cat(encoded)
    features_PD = torch.empty_like(encoded_PD)
    features_PD[torch.tensor(positions, device=device)] = encoded_PD
    return features_PD, torch.tensor([row[text] for text in texts], device=device)


def _trees(model: TextModel, tokens: list[list[int]], batch_size: int, device: torch.device | str) -> list[_Share]:
    trees = grow(tokens)
    at_once = max(1, batch_size * 5 // NODES)  # a prompt has about five nodes of its own

    def encode(packed: TokenTrees) -> Tensor:
        tokens, *layout = (_send(part, device) for part in packed)
        return model.encode_text_trees(tokens, TreeLayout(*layout))  # type: ignore[attr-defined]

    groups = [trees[start : start + at_once] for start in range(0, len(trees), at_once)]
    return [
        _Share([text for tree in group for text in tree.texts], lambda group=group: encode(pack(group)))  # type: ignore[misc]
        for group in groups
    ]


def _batches(
    model: TextModel, tokens: list[list[int]], tokenizer: Tokenizes, batch_size: int, device: torch.device | str
) -> list[_Share]:
    order = sorted(range(len(tokens)), key=lambda position: len(tokens[position]))
    groups = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]

    def encode(group: list[int]) -> Tensor:
        padded = tokenizer.pad([tokens[position] for position in group])
        return model.encode_text(_send(padded, device), normalize=True)

    return [_Share(group, lambda group=group: encode(group)) for group in groups]  # type: ignore[misc]


def _send(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return a tensor of the CPU on `device`. Pinned memory lets a GPU fetch it while the process prepares the next batch."""
    pinned = tensor.pin_memory() if torch.device(device).type == "cuda" else tensor
    return pinned.to(device, non_blocking=True)


def encode_texts(
    model: TextModel,
    tokenizer: Tokenizes,
    texts: Sequence[str],
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    what: str | None = None,
    shared: bool = False,
) -> Tensor:
    """[N, D] float32 of unit norm, on `device`; equal texts have equal features. See `encode_distinct_texts`."""
    features_PD, index_N = encode_distinct_texts(model, tokenizer, texts, batch_size, device, what, shared)
    return features_PD[index_N]


def encode_pixels(
    model: ImageModel,
    pixels_BCHW: Tensor,
    preprocessing: Preprocessing,
    device: torch.device,
    precision: str = "32-true",
) -> Tensor:
    """[B, D] float32 of unit norm, of uint8 pictures that went through the evaluation transform."""
    image_BCHW = normalize(pixels_BCHW.to(device, non_blocking=True), preprocessing.mean, preprocessing.std)
    with inference(precision, device):
        return model.encode_image(image_BCHW, normalize=True).float()
