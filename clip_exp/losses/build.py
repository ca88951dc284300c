"""From a loss's configuration to the loss."""

from torch import nn

from clip_exp.config.data import PairLabel
from clip_exp.config.training import LossConfig, SigmoidLossConfig
from clip_exp.losses.sigmoid import SigmoidLoss
from clip_exp.losses.softmax import SoftmaxLoss


def build_loss(config: LossConfig) -> nn.Module:
    """A module that takes (CLIPOutput, caption_id_B, image_id_B) and returns a scalar; see `SoftmaxLoss`, `SigmoidLoss`."""
    repeated = {
        "same_caption": config.same_caption == PairLabel.positive,
        "same_image": config.same_image == PairLabel.positive,
    }
    if isinstance(config, SigmoidLossConfig):
        return SigmoidLoss(**repeated, chunk_size=config.chunk_size)
    return SoftmaxLoss(**repeated)
