"""What losses share: a model's output, the ranks' shards of a batch brought together, and which of its pairs match.

Every rank must hold equally many samples; with one process bringing together is the identity.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from clip_exp.ranks.group import rank, world_size

ALL = slice(None)
# The collectives of one tensor have other names since torch 2.13, where the former are deprecated. NCCL copies lists of tensors.
_RENAMED = hasattr(dist, "all_gather_single")


class CLIPOutput(NamedTuple):
    """What a loss needs. Features are float32 of unit norm, also under autocast."""

    image_features: Tensor  # [B, D]
    text_features: Tensor  # [B, D]
    logit_scale: Tensor  # [1]: factor of the cosines, 1 / temperature
    logit_bias: Tensor | None  # [1]: added after the factor


def gather(x_B: Tensor) -> Tensor:
    """All ranks' rows in the order of the ranks, without gradient: [W * B, ...]."""
    if world_size() == 1:
        return x_B
    all_G = x_B.new_empty(world_size() * x_B.shape[0], *x_B.shape[1:])
    all_gather = dist.all_gather_single if _RENAMED else dist.all_gather_into_tensor
    all_gather(all_G, x_B.contiguous())
    return all_G


class _Gather(torch.autograd.Function):
    """Every rank's loss depends on every rank's rows, so a row's gradient is the sum over the ranks."""

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
    """All ranks' rows in the order of the ranks, with the exact gradient of the sum of the ranks' losses: [W * B, D]."""
    return x_BD if world_size() == 1 else _Gather.apply(x_BD)


def own_columns(rows: int, device: torch.device) -> Tensor:
    """For each of this rank's rows the column of its own pair in the global batch: int64 [B]."""
    return torch.arange(rows, device=device) + rank() * rows


class Matches:
    """This rank's rows against the columns of the global batch, told by equal ids.

    Args:
        ids: int64 [B] each, of this rank's pairs; a row matches a column where any of them is equal. All ranks construct.
    """

    def __init__(self, ids: list[Tensor]) -> None:
        self._ids = [(ids_B, gather(ids_B)) for ids_B in ids]

    def block(self, rows: slice = ALL, columns: slice = ALL) -> Tensor:
        """bool [rows, columns], the own pair included."""
        return torch.stack([row_B[rows, None] == column_G[None, columns] for row_B, column_G in self._ids]).any(dim=0)


def repeated_matches(
    caption_id_B: Tensor, image_id_B: Tensor, *, same_caption: bool, same_image: bool
) -> Matches | None:
    """The matches of a batch, or None where only the own pair matches.

    Args:
        caption_id_B: int64, equal where captions are equal.
        image_id_B: int64, equal where images are equal.
        same_caption: pairs of equal captions match.
        same_image: pairs of equal images match.
    """
    chosen = [ids_B for ids_B, use in [(caption_id_B, same_caption), (image_id_B, same_image)] if use]
    return Matches(chosen) if chosen else None
