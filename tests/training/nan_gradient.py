"""A loss whose value is finite and whose gradient is not a number."""

import torch
from torch import Tensor, nn


class Loss(nn.Module):
    def forward(self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
        distance = (image_features - image_features.detach()).square().sum()
        return torch.sqrt(distance) + logit_scale.sum() * (image_features * text_features).sum()
