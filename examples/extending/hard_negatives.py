"""A loss with a hard negative caption per image, from a column of the table (NegCLIP; Yuksekgonul et al. 2023).

python train.py --config-dir examples/extending/conf loss=hard_negatives data=csv data.train=pairs.csv model=vit_b32
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class HardNegatives(nn.Module):
    """Symmetric cross-entropy, where each image is also compared with the hard negatives of all images.

    Args:
        weight: weight of the classification of images; that of texts has 1 - weight.
    """

    def __init__(self, weight: float = 0.5) -> None:
        super().__init__()
        self.weight = weight

    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, hard_negative: Tensor
    ) -> Tensor:
        """Return the loss of a global batch.

        Args:
            image_features: [G, D], unit norm.
            text_features: [G, D], unit norm.
            logit_scale: [1], factor of the cosine similarities.
            hard_negative: [G, D], features of the texts in the column hard_negative (`data.columns`).
        """
        texts = torch.cat([text_features, hard_negative])
        target = torch.arange(len(image_features), device=texts.device)
        of_images = F.cross_entropy(logit_scale * image_features @ texts.T, target)
        of_texts = F.cross_entropy(logit_scale * text_features @ image_features.T, target)
        return self.weight * of_images + (1 - self.weight) * of_texts
