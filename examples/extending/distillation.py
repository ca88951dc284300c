"""A loss with distillation from a frozen teacher, which encodes the images of each batch.

python train.py --config-dir examples/extending/conf loss=distillation loss.teacher=outputs/train/… model=vit_tiny data=digits
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.v2.functional import normalize, resize

import clip_exp
from clip_exp.data.images import preprocessing_of


class Distillation(nn.Module):
    """Symmetric cross-entropy, and the mean squared error to the image similarities of the teacher.

    Args:
        teacher: a run, or the file of an exported model; see `clip_exp.load`.
        weight: weight of the distillation.
    """

    def __init__(self, teacher: str, weight: float = 1.0) -> None:
        super().__init__()
        loaded = clip_exp.load(teacher, accelerator="cpu")
        self.teacher = loaded.model.image  # frozen: identified by a hash in checkpoints, not saved
        self.size, self.mean, self.std, *_ = preprocessing_of(loaded.config.image)
        self.weight = weight

    @torch.no_grad()
    def per_rank(self, images: Tensor) -> dict[str, Tensor]:
        """Return what the loss needs from the images of this rank, uint8 [B, 3, S, S]; it is gathered like the features."""
        x = normalize(resize(images, [self.size, self.size]).float() / 255, self.mean, self.std)
        return {"teacher_features": F.normalize(self.teacher(x).float(), dim=-1)}

    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, teacher_features: Tensor
    ) -> Tensor:
        """Return the loss of a global batch; features have the shape [G, D] and unit norm."""
        logits = logit_scale * image_features @ text_features.T
        target = torch.arange(len(logits), device=logits.device)
        contrastive = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        distilled = F.mse_loss(image_features @ image_features.T, teacher_features @ teacher_features.T)
        return contrastive + self.weight * distilled
