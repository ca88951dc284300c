"""Configuration of the softmax loss. No torch."""

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
        math.log(1 / 0.07), description="initial scale for random weights, as natural logarithm; default ln(1 / 0.07)"
    )
    max_logit_scale: Logarithm | None = Field(
        None,
        description="largest scale, as natural logarithm; null: ln 100, or the scale of the `pretrained` weights if that is larger",
    )

    published_limit: ClassVar[float] = math.log(100)  # Radford et al. 2021, section 2.5

    def chance_level(self, pairs: int) -> float:
        """Return ln N: every softmax over N equal logits is 1 / N, also if the target is uniform over several matches."""
        return math.log(pairs)

    def build(self) -> "nn.Module":
        from clip_exp.losses.softmax.loss import SoftmaxLoss  # imports torch

        return SoftmaxLoss(**self.matches)
