"""A loss with distillation from features of a teacher that were stored in a column of the table (as in MobileCLIP).

python train.py --config-dir examples/extending/conf loss=stored_distillation data=csv data.train=pairs.parquet model=vit_b32
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class StoredDistillation(nn.Module):
    """Symmetric cross-entropy, and the cross-entropy to the teacher's similarities between images.

    Args:
        weight: weight of the distillation.
        temperature: temperature of the similarities.
    """

    def __init__(self, weight: float = 1.0, temperature: float = 0.1) -> None:
        super().__init__()
        self.weight, self.temperature = weight, temperature

    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, teacher_features: Tensor
    ) -> Tensor:
        """Return the loss of a global batch.

        Args:
            image_features: [G, D], unit norm.
            text_features: [G, D], unit norm.
            logit_scale: [1], factor of the cosine similarities.
            teacher_features: [G, E], numbers of the column teacher_features (`data.columns`).
        """
        logits = logit_scale * image_features @ text_features.T
        target = torch.arange(len(logits), device=logits.device)
        contrastive = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        teacher = F.normalize(teacher_features, dim=-1)
        soft_target = (teacher @ teacher.T / self.temperature).softmax(dim=-1)
        distilled = F.cross_entropy(image_features @ image_features.T / self.temperature, soft_target)
        return contrastive + self.weight * distilled
