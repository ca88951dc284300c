"""The configuration of the softmax loss. No torch."""

import math
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from clip_exp.config.training import Logarithm, LossConfig

if TYPE_CHECKING:
    from torch import nn


class SoftmaxLossConfig(LossConfig):
    """Symmetric cross-entropy over the global batch (Radford et al. 2021)."""

    name: Literal["softmax"] = "softmax"
    init_logit_scale: Logarithm = Field(
        math.log(1 / 0.07), description="natural logarithm, ln(1 / 0.07), of random weights"
    )
    max_logit_scale: Logarithm | None = Field(
        None,
        description="natural logarithm of the largest scale; null: ln 100, or what `pretrained` weights have if that is more",
    )

    published_limit: ClassVar[float] = math.log(100)  # Radford et al. 2021, section 2.5

    def build(self) -> "nn.Module":
        from clip_exp.losses.softmax.loss import SoftmaxLoss  # imports torch

        return SoftmaxLoss(**self.matches)
