"""Bringing the ranks' shares of a batch together; with one process everything here is the identity.

Every rank must hold equally many samples.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from clip_exp.ranks.group import world_size


def gather(x_B: Tensor) -> Tensor:
    """All ranks' rows in the order of the ranks, without gradient: [W * B, ...]."""
    if world_size() == 1:
        return x_B
    all_G = x_B.new_empty(world_size() * x_B.shape[0], *x_B.shape[1:])
    dist.all_gather(list(all_G.chunk(world_size())), x_B.contiguous())
    return all_G


class _Gather(torch.autograd.Function):
    """Every rank's loss depends on every rank's rows, so a row's gradient is the sum over the ranks."""

    @staticmethod
    def forward(ctx: Any, x_BD: Tensor) -> Tensor:
        return gather(x_BD)

    @staticmethod
    def backward(ctx: Any, grad_GD: Tensor) -> Tensor:
        chunks = list(grad_GD.contiguous().chunk(world_size()))
        grad_BD = torch.empty_like(chunks[0])
        dist.reduce_scatter(grad_BD, chunks)
        return grad_BD


def gather_with_grad(x_BD: Tensor) -> Tensor:
    """All ranks' rows in the order of the ranks, with the exact gradient of the sum of the ranks' losses: [W * B, D]."""
    return x_BD if world_size() == 1 else _Gather.apply(x_BD)
