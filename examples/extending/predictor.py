"""A loss with a learnable head: a predictor of the text features from the image features (as in SimSiam; Chen and He 2021).

python train.py --config-dir examples/extending/conf loss=predictor data=digits model=vit_tiny
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Predictor(nn.Module):
    """Symmetric cross-entropy, and the distance between predicted and actual text features.

    The head is trained with the model and resumed, but it is not part of the exported model.

    Args:
        embed_dim: channels of the features.
        hidden: channels of the hidden layer.
        weight: weight of the prediction.
    """

    def __init__(self, embed_dim: int, hidden: int = 64, weight: float = 1.0) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Linear(embed_dim, hidden), nn.GELU(), nn.Linear(hidden, embed_dim))
        self.weight = weight

    def forward(self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
        """Return the loss of a global batch; features have the shape [G, D] and unit norm."""
        logits = logit_scale * image_features @ text_features.T
        target = torch.arange(len(logits), device=logits.device)
        contrastive = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        predicted = F.normalize(self.head(image_features), dim=-1)
        return contrastive + self.weight * (1 - (predicted * text_features.detach()).sum(dim=-1)).mean()
