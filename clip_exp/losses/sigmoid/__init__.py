"""Configuration of the sigmoid loss. No torch."""

import math
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from clip_exp.config.base import Count, Float
from clip_exp.config.training import Logarithm, LossConfig

if TYPE_CHECKING:
    from torch import nn


class SigmoidLossConfig(LossConfig):
    """Binary classification of every pair of the global batch (SigLIP, Zhai et al. 2023)."""

    name: Literal["sigmoid"] = "sigmoid"
    init_logit_scale: Logarithm = Field(
        math.log(10), description="initial scale for random weights, as natural logarithm; default ln 10"
    )
    max_logit_scale: Logarithm | None = Field(
        None, description="largest scale, as natural logarithm; null: no limit, as for SigLIP"
    )
    init_logit_bias: Annotated[Float, Field(ge=-1e3, le=1e3)] = Field(
        -10.0, description="initial bias for random weights"
    )
    chunk_size: Count = Field(1024, description="number of images compared at a time; smaller values need less memory")

    published_limit: ClassVar[float] = math.inf  # as in big_vision, whose published weights have scales of 112 and more

    @property
    def logit_bias(self) -> float | None:
        return self.init_logit_bias

    def chance_level(self, pairs: int) -> float | None:
        """Return N ln N - (N - 1) ln(N - 1), which is about ln N + 1.

        An image has one match among N texts. If all its logits are z, its loss (Zhai et al. 2023, equation 1) is softplus(-z) +
        (N - 1) softplus(z). The derivative, N sigmoid(z) - 1, is 0 where sigmoid(z) = 1 / N, and there the loss is ln N +
        (N - 1) ln(N / (N - 1)). With further matches the level depends on their number in the batch, which is not known here.
        """
        if any(self.matches.values()):
            return None
        return math.log(pairs) + (pairs - 1) * math.log1p(1 / (pairs - 1))

    def build(self) -> "nn.Module":
        from clip_exp.losses.sigmoid.loss import SigmoidLoss  # imports torch

        return SigmoidLoss(**self.matches, chunk_size=self.chunk_size)
