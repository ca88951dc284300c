"""Symmetric cross-entropy over the similarities of a batch (InfoNCE; Radford et al. 2021, figure 3).

Each image is classified among the texts of the global batch, and each text among its images. Each rank computes the rows of its own
pairs: a block [B, G] of the similarities, not the whole matrix [G, G]. The gradient of the result, averaged over the ranks, is
exactly that of one process with the whole batch.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clip_exp.losses.batch import CLIPOutput, gather_with_grad, own_columns, repeated_matches
from clip_exp.ranks.group import world_size


def softmax_loss(
    image_features_BD: Tensor, text_features_BD: Tensor, logit_scale: Tensor, matches_BG: Tensor | None = None
) -> Tensor:
    """Compute the mean of the cross-entropies from image to text and from text to image, over this rank's pairs.

    The mean of this value over the ranks is the loss of the global batch. The same is true of the gradients, including that of the
    logit scale.

    Args:
        image_features_BD: image features with unit norm.
        text_features_BD: text features with unit norm.
        logit_scale: factor of the cosine similarities, [1] or scalar.
        matches_BG: bool, the columns of the global batch that match each row; the target is uniform over them. None: each row
            matches its own pair only.

    Returns:
        A float32 scalar, also under autocast.
    """
    device = image_features_BD.device
    # Without autocast: bf16 logits up to 100 would be rounded to multiples of 0.5.
    with torch.autocast(device.type, enabled=False):
        image_BD, text_BD = image_features_BD.float(), text_features_BD.float()
        if world_size() == 1:
            image_logits_BG = logit_scale.float() * image_BD @ text_BD.T
            text_logits_BG = image_logits_BG.T
        else:
            # Images and texts are gathered together: one collective, and its latency, instead of two.
            all_image_GD, all_text_GD = gather_with_grad(torch.cat([image_BD, text_BD], dim=1)).chunk(2, dim=1)
            image_logits_BG = logit_scale.float() * image_BD @ all_text_GD.T
            text_logits_BG = logit_scale.float() * text_BD @ all_image_GD.T
        if matches_BG is None:
            target = own_columns(len(image_BD), device)
        else:
            target = matches_BG / matches_BG.sum(dim=1, keepdim=True)
        return (F.cross_entropy(image_logits_BG, target) + F.cross_entropy(text_logits_BG, target)) / 2


class SoftmaxLoss(nn.Module):
    """Module of `softmax_loss`.

    Args:
        same_caption: whether pairs with equal captions in the global batch match.
        same_image: whether pairs with equal images in the global batch match.
    """

    def __init__(self, *, same_caption: bool = False, same_image: bool = False) -> None:
        super().__init__()
        self.same_caption = same_caption
        self.same_image = same_image

    def forward(self, output: CLIPOutput, caption_id_B: Tensor, image_id_B: Tensor) -> Tensor:
        """Compute the loss, a float32 scalar, from a model's output and the int64 ids of its captions and images."""
        matches = repeated_matches(caption_id_B, image_id_B, same_caption=self.same_caption, same_image=self.same_image)
        matches_BG = None if matches is None else matches.block()
        return softmax_loss(output.image_features, output.text_features, output.logit_scale, matches_BG)
