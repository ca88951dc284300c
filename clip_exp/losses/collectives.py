"""Bringing the ranks' shares of a batch together; with one process everything here is the identity.

Every rank must hold equally many samples.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from clip_exp.ranks.group import world_size

# The collectives of one tensor have other names since torch 2.13, where the former are deprecated. NCCL copies lists of tensors.
_RENAMED = hasattr(dist, "all_gather_single")


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
