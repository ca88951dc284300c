"""A loss for images with several captions: all captions of an image in the batch are positives (SupCon; Khosla et al. 2020).

python train.py --config-dir examples/extending/conf loss=multi_positive data=csv data.train=pairs.csv data.captions=all
"""

from torch import Tensor
from torch.nn import functional as F


def multi_positive(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor, image_ids: Tensor, *, smoothing: float = 0.0
) -> Tensor:
    """Return the symmetric cross-entropy with targets that are uniform over the pairs with the same image.

    Args:
        image_features: [G, D], unit norm.
        text_features: [G, D], unit norm.
        logit_scale: [1], factor of the cosine similarities.
        image_ids: int64 [G], equal for equal images.
        smoothing: label smoothing.
    """
    positive = (image_ids[:, None] == image_ids[None, :]).float()
    target = positive / positive.sum(dim=1, keepdim=True)
    logits = logit_scale * image_features @ text_features.T
    of_images = F.cross_entropy(logits, target, label_smoothing=smoothing)
    return (of_images + F.cross_entropy(logits.T, target, label_smoothing=smoothing)) / 2
