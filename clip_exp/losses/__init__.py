"""Contrastive losses over the global batch, exact in value and gradient on any number of processes."""

from clip_exp.losses.build import build_loss
from clip_exp.losses.sigmoid import SigmoidLoss, sigmoid_loss
from clip_exp.losses.softmax import SoftmaxLoss, softmax_loss

__all__ = ["SigmoidLoss", "SoftmaxLoss", "build_loss", "sigmoid_loss", "softmax_loss"]
