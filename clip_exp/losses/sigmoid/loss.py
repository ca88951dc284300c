"""Sigmoid loss: a binary classification of every pair of an image and a text (SigLIP; Zhai et al. 2023, algorithm 1 and section 3.3).

The texts travel around a ring of ranks, and each rank compares its images with the block of texts that it currently has, a chunk of
images at a time. So the memory of a rank does not depend on the number of ranks: one chunk of similarities, its own features, and two
blocks of texts, the current one and the next.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from clip_exp.losses.batch import CLIPOutput, Matches, repeated_matches, start_exchange
from clip_exp.ranks.group import rank, world_size

CHUNK_SIZE = 1024


def sigmoid_loss(
    image_features_BD: Tensor,
    text_features_BD: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None = None,
    matches: Matches | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> Tensor:
    """Compute -log sigmoid(label * logit), summed over the texts of the global batch and averaged over this rank's images.

    The mean of this value over the ranks is the loss of the global batch, and the same is true of the gradients. The gradient is
    computed in the forward pass, so that the backward pass needs no similarities and no communication.

    Args:
        image_features_BD: image features with unit norm.
        text_features_BD: text features with unit norm, the same number on every rank.
        logit_scale: factor of the cosine similarities, [1] or scalar.
        logit_bias: value added to the scaled similarities, [1] or scalar.
        matches: pairs with the label +1; None: each image matches only its own text.
        chunk_size: number of images that are compared at a time with the texts of one rank.

    Returns:
        A float32 scalar, also under autocast.
    """
    with torch.autocast(image_features_BD.device.type, enabled=False):
        bias = torch.zeros_like(logit_scale) if logit_bias is None else logit_bias
        loss: Tensor = _Ring.apply(
            image_features_BD.float(), text_features_BD.float(), logit_scale.float(), bias.float(), matches, chunk_size
        )
        return loss


class _Sums(NamedTuple):
    """Sums of a rank over all texts. Scalars are float64, because they have many small terms."""

    loss: Tensor
    scale: Tensor  # gradient of the scale
    bias: Tensor  # gradient of the bias
    image_BD: Tensor  # gradient of the image features


class _Ring(torch.autograd.Function):
    """Ring over the ranks. Each block of texts visits every rank together with its gradient, and returns with the sum over the ranks."""

    @staticmethod
    def forward(
        ctx: Any,
        image_BD: Tensor,
        text_BD: Tensor,
        scale: Tensor,
        bias: Tensor,
        matches: Matches | None,
        chunk_size: int,
    ) -> Tensor:
        needed = any(ctx.needs_input_grad)
        zero = torch.zeros((), dtype=torch.float64, device=image_BD.device)
        sums = _Sums(zero, zero.clone(), zero.clone(), torch.zeros_like(image_BD))
        block_BD, gradient_BD = text_BD.contiguous(), torch.zeros_like(text_BD)
        for hop in range(world_size()):
            owner = (rank() - hop) % world_size()
            next_block = start_exchange(block_BD) if hop + 1 < world_size() else None
            for start in range(0, len(image_BD), chunk_size):
                rows = slice(start, min(start + chunk_size, len(image_BD)))
                label = _label(rows, owner, len(block_BD), matches, image_BD.device)
                _score(image_BD, block_BD, gradient_BD, rows, label, (scale, bias), sums, needed)
            if needed and world_size() > 1:
                gradient_BD = start_exchange(gradient_BD).wait()
            if next_block is not None:
                block_BD = next_block.wait()
        ctx.rows = len(image_BD)
        if needed:
            ctx.save_for_backward(
                sums.image_BD, gradient_BD, sums.scale.to(scale).expand_as(scale), sums.bias.to(bias).expand_as(bias)
            )
        return (sums.loss / len(image_BD)).float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        factor = grad / ctx.rows
        return *(factor * gradient for gradient in ctx.saved_tensors), None, None


def _score(
    image_BD: Tensor,
    block_CD: Tensor,
    gradient_CD: Tensor,
    rows: slice,
    label_RC: Tensor | None,
    scale_and_bias: tuple[Tensor, Tensor],
    sums: _Sums,
    needed: bool,
) -> None:
    """Compare a chunk of images with a block of texts, and add to the sums and to the gradient of the texts."""
    scale, bias = scale_and_bias
    image_RD = image_BD[rows]
    cosine_RC = image_RD @ block_CD.T
    logit_RC = scale * cosine_RC + bias
    # -log sigmoid(z) for a match, -log sigmoid(-z) otherwise; its derivative in z is sigmoid(z) - match.
    loss_RC = F.softplus(logit_RC) if label_RC is None else F.softplus(torch.where(label_RC, -logit_RC, logit_RC))
    sums.loss.add_(loss_RC.sum(dtype=torch.float64))
    if needed:
        slope_RC = logit_RC.sigmoid()
        if label_RC is not None:
            slope_RC -= label_RC.to(slope_RC.dtype)
        sums.scale.add_((slope_RC * cosine_RC).sum(dtype=torch.float64))
        sums.bias.add_(slope_RC.sum(dtype=torch.float64))
        sums.image_BD[rows].addmm_(slope_RC, scale * block_CD)
        gradient_CD.addmm_(slope_RC.T, scale * image_RD)


def _label(rows: slice, owner: int, columns: int, matches: Matches | None, device: torch.device) -> Tensor | None:
    """Return which texts of rank `owner` match this rank's images `rows`: bool [R, C]; None if none of them match."""
    if matches is not None:
        return matches.block(rows, slice(owner * columns, (owner + 1) * columns))
    if owner != rank():
        return None
    return torch.arange(rows.start, rows.stop, device=device)[:, None] == torch.arange(columns, device=device)


class SigmoidLoss(nn.Module):
    """Module of `sigmoid_loss`.

    Args:
        same_caption: whether pairs with equal captions in the global batch match.
        same_image: whether pairs with equal images in the global batch match.
        chunk_size: number of images that are compared at a time; see `sigmoid_loss`.
    """

    def __init__(self, *, same_caption: bool = False, same_image: bool = False, chunk_size: int = CHUNK_SIZE) -> None:
        super().__init__()
        self.same_caption = same_caption
        self.same_image = same_image
        self.chunk_size = chunk_size

    def forward(self, output: CLIPOutput, caption_id_B: Tensor, image_id_B: Tensor) -> Tensor:
        """Compute the loss, a float32 scalar, from a model's output and the int64 ids of its captions and images."""
        matches = repeated_matches(caption_id_B, image_id_B, same_caption=self.same_caption, same_image=self.same_image)
        image_BD, text_BD, scale, bias = output[:4]
        return sigmoid_loss(image_BD, text_BD, scale, bias, matches, self.chunk_size)
