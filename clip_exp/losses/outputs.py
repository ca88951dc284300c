"""What a model hands to a loss."""

from typing import NamedTuple

from torch import Tensor


class CLIPOutput(NamedTuple):
    """What a loss needs. Features are float32 of unit norm, also under autocast."""

    image_features: Tensor  # [B, D]
    text_features: Tensor  # [B, D]
    logit_scale: Tensor  # [1]: factor of the cosines, 1 / temperature
    logit_bias: Tensor | None  # [1]: added after the factor
