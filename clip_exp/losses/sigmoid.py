"""A binary decision for each pair of a picture and a text (SigLIP; Zhai et al. 2023, algorithm 1)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clip_exp.losses.collectives import gather_with_grad
from clip_exp.losses.matches import own_matches, repeated_matches
from clip_exp.models.clip import CLIPOutput


def sigmoid_loss(
    image_features_BD: Tensor,
    text_features_BD: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None = None,
    matches_BG: Tensor | None = None,
) -> Tensor:
    """Sum over the texts of the global batch, mean over this rank's pictures, of -log sigmoid(label * logit).

    The mean over the ranks, and of their gradients, is that of the global batch.

    Args:
        image_features_BD: unit norm.
        text_features_BD: unit norm.
        logit_scale: [1] or scalar, factor of the cosines.
        logit_bias: [1] or scalar, added after.
        matches_BG: bool, which columns of the global batch have the label +1. None: each row's own pair.

    Returns:
        scalar, float32 whatever the autocast around.
    """
    device = image_features_BD.device
    with torch.autocast(device.type, enabled=False):
        image_BD, all_text_GD = image_features_BD.float(), gather_with_grad(text_features_BD.float())
        logits_BG = logit_scale.float() * image_BD @ all_text_GD.T
        if logit_bias is not None:
            logits_BG = logits_BG + logit_bias.float()
        if matches_BG is None:
            matches_BG = own_matches(len(image_BD), device)
        return -F.logsigmoid(torch.where(matches_BG, logits_BG, -logits_BG)).sum() / len(image_BD)


class SigmoidLoss(nn.Module):
    """`sigmoid_loss` of a model's output.

    Args:
        same_caption: equal captions in the global batch match each other.
        same_image: equal pictures in the global batch match each other.
    """

    def __init__(self, *, same_caption: bool = False, same_image: bool = False) -> None:
        super().__init__()
        self.same_caption = same_caption
        self.same_image = same_image

    def forward(self, output: CLIPOutput, caption_id_B: Tensor, image_id_B: Tensor) -> Tensor:
        """Scalar float32 from a model's output and the int64 ids of its captions and pictures."""
        matches_BG = repeated_matches(
            caption_id_B, image_id_B, same_caption=self.same_caption, same_image=self.same_image
        )
        return sigmoid_loss(*output, matches_BG)
