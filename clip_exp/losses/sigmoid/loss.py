"""A binary decision for each pair of an image and a text (SigLIP; Zhai et al. 2023, algorithm 1 and section 3.3).

The texts go round the ring of ranks, and each rank scores its images against what it holds, a chunk of rows at a time: however
many ranks there are, one holds a chunk of similarities, and beside its own features those of the rank that it scores and the next.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from clip_exp.losses.batch import CLIPOutput, Matches, repeated_matches
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
    """Sum over the texts of the global batch, mean over this rank's images, of -log sigmoid(label * logit).

    The mean over the ranks, and of their gradients, is that of the global batch. The gradient is computed on the way, so the
    backward pass needs no similarities and no communication.

    Args:
        image_features_BD: unit norm.
        text_features_BD: unit norm, as many on every rank.
        logit_scale: [1] or scalar, factor of the cosines.
        logit_bias: [1] or scalar, added after.
        matches: which pairs have the label +1. None: each image with its own text.
        chunk_size: images that are scored at a time, against the texts of one rank.

    Returns:
        scalar, float32 whatever the autocast around.
    """
    with torch.autocast(image_features_BD.device.type, enabled=False):
        bias = torch.zeros_like(logit_scale) if logit_bias is None else logit_bias
        loss: Tensor = _Ring.apply(
            image_features_BD.float(), text_features_BD.float(), logit_scale.float(), bias.float(), matches, chunk_size
        )
        return loss


class _Sums(NamedTuple):
    """What a rank adds up over all texts; scalars in float64, since there are many small terms."""

    loss: Tensor
    scale: Tensor  # gradients
    bias: Tensor
    image_BD: Tensor


class _Ring(torch.autograd.Function):
    """Each block of texts visits every rank, its gradient with it, and comes home with the sum over the ranks."""

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
            next_block = _start_passing_on(block_BD) if hop + 1 < world_size() else None
            for start in range(0, len(image_BD), chunk_size):
                rows = slice(start, min(start + chunk_size, len(image_BD)))
                label = _label(rows, owner, len(block_BD), matches, image_BD.device)
                _score(image_BD, block_BD, gradient_BD, rows, label, (scale, bias), sums, needed)
            if needed and world_size() > 1:
                gradient_BD = _start_passing_on(gradient_BD).wait()
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
    """Add one chunk of images against one block of texts to the sums, and to the gradient of the texts."""
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
    """Which texts of rank `owner` match this rank's images `rows`: bool [R, C]; None: none of them."""
    if matches is not None:
        return matches.block(rows, slice(owner * columns, (owner + 1) * columns))
    if owner != rank():
        return None
    return torch.arange(rows.start, rows.stop, device=device)[:, None] == torch.arange(columns, device=device)


class _Passing(NamedTuple):
    received: Tensor
    requests: list[dist.Work]

    def wait(self) -> Tensor:
        for request in self.requests:
            request.wait()
        return self.received


def _start_passing_on(x: Tensor) -> _Passing:
    """Send `x`, which must not change meanwhile, to the next rank, and receive what the one before sends."""
    received = torch.empty_like(x)
    after, before = (rank() + 1) % world_size(), (rank() - 1) % world_size()
    operations = [dist.P2POp(dist.isend, x, after), dist.P2POp(dist.irecv, received, before)]
    return _Passing(received, dist.batch_isend_irecv(operations))


class SigmoidLoss(nn.Module):
    """`sigmoid_loss` of a model's output.

    Args:
        same_caption: equal captions in the global batch match each other.
        same_image: equal images in the global batch match each other.
        chunk_size: see `sigmoid_loss`.
    """

    def __init__(self, *, same_caption: bool = False, same_image: bool = False, chunk_size: int = CHUNK_SIZE) -> None:
        super().__init__()
        self.same_caption = same_caption
        self.same_image = same_image
        self.chunk_size = chunk_size

    def forward(self, output: CLIPOutput, caption_id_B: Tensor, image_id_B: Tensor) -> Tensor:
        """Scalar float32 from a model's output and the int64 ids of its captions and images."""
        matches = repeated_matches(caption_id_B, image_id_B, same_caption=self.same_caption, same_image=self.same_image)
        return sigmoid_loss(*output, matches, self.chunk_size)
