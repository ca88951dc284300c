"""Losses as a user writes them, with the public building blocks."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clip_exp.losses.batch import gather_with_grad, own_columns, ring_exchange
from clip_exp.ranks.group import world_size


class RingSigmoid(nn.Module):
    """Sigmoid loss that compares the images of a rank with one block of texts at a time (`loss.gather=false`)."""

    def forward(self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
        rows, block, total = len(image_features), text_features, image_features.new_zeros(())
        for hop in range(world_size()):
            block = ring_exchange(block) if hop else block
            label = 2 * torch.eye(rows) - 1 if hop == 0 else -torch.ones(rows, rows)
            total = total - F.logsigmoid(label * (logit_scale * image_features @ block.T + logit_bias)).sum()
        return total / rows


class RowSoftmax(nn.Module):
    """Softmax loss over this rank's rows and all columns (`loss.gather=false`)."""

    def forward(self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
        target = own_columns(len(image_features), image_features.device)
        of_images = F.cross_entropy(logit_scale * image_features @ gather_with_grad(text_features).T, target)
        of_texts = F.cross_entropy(logit_scale * text_features @ gather_with_grad(image_features).T, target)
        return (of_images + of_texts) / 2


class Softmax(nn.Module):
    """The formula of one process, over the global batch."""

    def forward(self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
        logits = logit_scale * image_features @ text_features.T
        target = torch.arange(len(logits))
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
