"""Building blocks of contrastive losses: the output of a model, gathering features from all ranks, and the matching pairs.

A contrastive loss compares every image of the global batch with every text. Each rank encodes B of the W * B pairs, so features of
the other ranks must be gathered first. All ranks must have the same number of pairs; with one process, gathering changes nothing.
Shapes: B pairs of this rank, G = W * B pairs of the global batch, D features.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from clip_exp.ranks.group import rank, world_size

ALL = slice(None)
# Collectives on a single tensor, since those on lists of tensors make copies under NCCL. torch 2.13 renamed them and deprecated the
# former names.
_RENAMED = hasattr(dist, "all_gather_single")


class CLIPOutput(NamedTuple):
    """Output of a dual encoder for B pairs, the input of a loss. Features are float32 with unit norm, also under autocast."""

    image_features: Tensor  # [B, D]
    text_features: Tensor  # [B, D]
    logit_scale: Tensor  # [1]: factor of the cosine similarities, 1 / temperature (not its logarithm)
    logit_bias: Tensor | None  # [1]: added to the scaled similarities; None for losses without a bias
    # For custom losses; `columns` are those of `data.columns`, where texts are replaced by their features
    columns: Mapping[str, Tensor] = MappingProxyType({})  # [B, ...] by name
    images: Tensor | None = None  # uint8 [B, 3, S, S]
    tokens: Tensor | None = None  # int64 [B, L]


def gather(x_B: Tensor) -> Tensor:
    """Concatenate the rows of all ranks in rank order, without gradient: [B, ...] to [W * B, ...]."""
    if world_size() == 1:
        return x_B
    all_G = x_B.new_empty(world_size() * x_B.shape[0], *x_B.shape[1:])
    all_gather = dist.all_gather_single if _RENAMED else dist.all_gather_into_tensor
    all_gather(all_G, x_B.contiguous())
    return all_G


class _Gather(torch.autograd.Function):
    """All-gather with a gradient. The loss of every rank depends on the rows of all ranks, so gradients are summed over the ranks."""

    @staticmethod
    def forward(ctx: Any, x_BD: Tensor) -> Tensor:
        return gather(x_BD)

    @staticmethod
    def backward(ctx: Any, grad_GD: Tensor) -> Tensor:
        grad_BD = grad_GD.new_empty(grad_GD.shape[0] // world_size(), *grad_GD.shape[1:])
        reduce_scatter = dist.reduce_scatter_single if _RENAMED else dist.reduce_scatter_tensor
        reduce_scatter(grad_BD, grad_GD.contiguous())
        return grad_BD


def gather_with_grad(x_BD: Tensor) -> Tensor:
    """Concatenate the rows of all ranks in rank order, with the exact gradient of the sum of their losses: [B, D] to [W * B, D]."""
    return x_BD if world_size() == 1 else _Gather.apply(x_BD)


class Exchange(NamedTuple):
    """Exchange of a tensor between neighboring ranks that has started."""

    received: Tensor
    requests: list[dist.Work]

    def wait(self) -> Tensor:
        for request in self.requests:
            request.wait()
        return self.received


def start_exchange(x: Tensor, *, reverse: bool = False) -> Exchange:
    """Start to send `x` to the next rank, and to receive from the previous one; `x` must not change until `wait` returns.

    Args:
        x: tensor of the same shape and dtype on every rank.
        reverse: send to the previous rank, and receive from the next one.
    """
    received = torch.empty_like(x)
    step = -1 if reverse else 1
    after, before = (rank() + step) % world_size(), (rank() - step) % world_size()
    operations = [dist.P2POp(dist.isend, x, after), dist.P2POp(dist.irecv, received, before)]
    return Exchange(received, dist.batch_isend_irecv(operations))


class _RingExchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BD: Tensor) -> Tensor:
        return start_exchange(x_BD.contiguous()).wait()

    @staticmethod
    def backward(ctx: Any, grad_BD: Tensor) -> Tensor:
        return start_exchange(grad_BD.contiguous(), reverse=True).wait()


def ring_exchange(x_BD: Tensor) -> Tensor:
    """Send the rows of this rank to the next rank, and return those of the previous one, with their exact gradient: [B, D].

    After `world_size() - 1` calls, each on the result of the one before, a rank has seen the rows of all ranks, one block at a time.
    """
    return x_BD if world_size() == 1 else _RingExchange.apply(x_BD)


def own_columns(rows: int, device: torch.device) -> Tensor:
    """Return the position of each of this rank's pairs in the global batch: int64 [B], the class labels of a cross-entropy."""
    return torch.arange(rows, device=device) + rank() * rows


class Matches:
    """Matches between this rank's pairs (rows) and those of the global batch (columns): pairs with an equal id.

    Constructing it is a collective operation: all ranks must do it.

    Args:
        ids: one or more int64 tensors [B] with ids of this rank's pairs; two pairs match if any of their ids are equal.
    """

    def __init__(self, ids: list[Tensor]) -> None:
        self._ids = [(ids_B, gather(ids_B)) for ids_B in ids]

    def block(self, rows: slice = ALL, columns: slice = ALL) -> Tensor:
        """Return a bool block [rows, columns] of the matrix of matches; every pair matches itself."""
        return torch.stack([row_B[rows, None] == column_G[None, columns] for row_B, column_G in self._ids]).any(dim=0)


def repeated_matches(
    caption_id_B: Tensor, image_id_B: Tensor, *, same_caption: bool, same_image: bool
) -> Matches | None:
    """Return the matches of a batch, or None if every image matches only its own text.

    Args:
        caption_id_B: int64, equal for equal captions.
        image_id_B: int64, equal for equal images.
        same_caption: whether pairs with equal captions match.
        same_image: whether pairs with equal images match.
    """
    chosen = [ids_B for ids_B, use in [(caption_id_B, same_caption), (image_id_B, same_image)] if use]
    return Matches(chosen) if chosen else None
