"""The configuration of the sigmoid loss. No torch."""

import math
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from clip_exp.config.base import Count, Float
from clip_exp.config.training import Logarithm, LossConfig

if TYPE_CHECKING:
    from torch import nn


class SigmoidLossConfig(LossConfig):
    """A binary decision for every pair of the global batch (SigLIP, Zhai et al. 2023)."""

    name: Literal["sigmoid"] = "sigmoid"
    init_logit_scale: Logarithm = Field(math.log(10), description="natural logarithm, ln 10, of random weights")
    max_logit_scale: Logarithm | None = Field(
        None, description="natural logarithm of the largest scale; null: no limit, as SigLIP was trained"
    )
    init_logit_bias: Annotated[Float, Field(ge=-1e3, le=1e3)] = Field(-10.0, description="bias of random weights")
    chunk_size: Count = Field(1024, description="images scored at a time: less, less memory")

    published_limit: ClassVar[float] = math.inf  # big_vision; its published weights have 112 and more

    @property
    def logit_bias(self) -> float | None:
        return self.init_logit_bias

    def build(self) -> "nn.Module":
        from clip_exp.losses.sigmoid.loss import SigmoidLoss  # imports torch

        return SigmoidLoss(**self.matches, chunk_size=self.chunk_size)
