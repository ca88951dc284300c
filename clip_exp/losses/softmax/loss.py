"""Symmetric cross-entropy over the similarities of a batch (InfoNCE; Radford et al. 2021, figure 3)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clip_exp.losses.batch import CLIPOutput, gather_with_grad, own_columns, repeated_matches
from clip_exp.ranks.group import world_size


def softmax_loss(
    image_features_BD: Tensor, text_features_BD: Tensor, logit_scale: Tensor, matches_BG: Tensor | None = None
) -> Tensor:
    """Mean over this rank's rows of the cross-entropy from image to text and from text to image.

    A rank scores its rows against the columns of all ranks, so the mean over the ranks, and of their gradients, is that
    of the global batch, for the logit scale too.

    Args:
        image_features_BD: unit norm.
        text_features_BD: unit norm.
        logit_scale: [1] or scalar, factor of the cosines.
        matches_BG: bool, which columns of the global batch match; the target is uniform over a row's matches. None:
            each row matches its own pair.

    Returns:
        scalar, float32 whatever the autocast around.
    """
    device = image_features_BD.device
    with torch.autocast(device.type, enabled=False):
        image_BD, text_BD = image_features_BD.float(), text_features_BD.float()
        if world_size() == 1:
            image_logits_BG = logit_scale.float() * image_BD @ text_BD.T
            text_logits_BG = image_logits_BG.T
        else:
            all_image_GD, all_text_GD = gather_with_grad(torch.cat([image_BD, text_BD], dim=1)).chunk(2, dim=1)
            image_logits_BG = logit_scale.float() * image_BD @ all_text_GD.T
            text_logits_BG = logit_scale.float() * text_BD @ all_image_GD.T
        if matches_BG is None:
            target = own_columns(len(image_BD), device)
        else:
            target = matches_BG / matches_BG.sum(dim=1, keepdim=True)
        return (F.cross_entropy(image_logits_BG, target) + F.cross_entropy(text_logits_BG, target)) / 2


class SoftmaxLoss(nn.Module):
    """`softmax_loss` of a model's output.

    Args:
        same_caption: equal captions in the global batch match each other.
        same_image: equal images in the global batch match each other.
    """

    def __init__(self, *, same_caption: bool = False, same_image: bool = False) -> None:
        super().__init__()
        self.same_caption = same_caption
        self.same_image = same_image

    def forward(self, output: CLIPOutput, caption_id_B: Tensor, image_id_B: Tensor) -> Tensor:
        """Scalar float32 from a model's output and the int64 ids of its captions and images."""
        matches = repeated_matches(caption_id_B, image_id_B, same_caption=self.same_caption, same_image=self.same_image)
        matches_BG = None if matches is None else matches.block()
        return softmax_loss(output.image_features, output.text_features, output.logit_scale, matches_BG)
