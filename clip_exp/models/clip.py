"""A dual encoder: two towers into one space, and the temperature that they are compared with (Radford et al. 2021)."""

import math
from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from clip_exp.config.base import broken_rules
from clip_exp.config.model import ModelConfig
from clip_exp.errors import ConfigError
from clip_exp.losses.batch import CLIPOutput


class HeldStatistics(AbstractContextManager[None]):
    """Inside, `tower` may run again over what it has seen without its running statistics counting that twice.

    They are put back rather than switched off, because `checkpoint` insists on saving the same tensors both times.
    """

    def __init__(self, tower: nn.Module) -> None:
        norms = (module for module in tower.modules() if isinstance(module, _BatchNorm) and module.training)
        self.statistics = [buffer for norm in norms for buffer in norm.buffers(recurse=False)]

    def __enter__(self) -> None:
        self.before = [statistic.clone() for statistic in self.statistics]

    def __exit__(self, *_: Any) -> None:
        for statistic, before in zip(self.statistics, self.before, strict=True):
            statistic.copy_(before)


def encode(tower: nn.Module, x: Tensor, micro_batch_size: int | None) -> Tensor:
    """Run `tower` over the batch, `micro_batch_size` samples at a time where a backward pass will follow.

    A chunk keeps only its output and is computed again in the backward pass, so memory is that of one chunk while the
    gradient is that of the whole batch, as in GradCache (Gao et al. 2021). Batch normalization takes its statistics from
    the chunk, in both passes, and counts each chunk once in its running statistics.

    Returns:
        [B, D].
    """
    if micro_batch_size is None or len(x) <= micro_batch_size or not torch.is_grad_enabled():
        return tower(x)

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), HeldStatistics(tower)

    chunks = x.split(micro_batch_size)
    return torch.cat([checkpoint(tower, chunk, use_reentrant=False, context_fn=contexts) for chunk in chunks])


def unit_norm(features_BD: Tensor) -> Tensor:
    return F.normalize(features_BD.float(), dim=-1)


class CLIP(nn.Module):
    """Any two towers whose outputs have the same width.

    Args:
        image: images to [B, D].
        text: token ids to [B, D].
        init_logit_scale: natural logarithm of the initial factor.
        init_logit_bias: none for the softmax loss, where a bias would cancel out.
    """

    def __init__(
        self, image: nn.Module, text: nn.Module, *, init_logit_scale: float, init_logit_bias: float | None = None
    ) -> None:
        super().__init__()
        self.image = image
        self.text = text
        # Of shape [1], not []: DeepSpeed cannot broadcast a parameter without an axis.
        self.logit_scale = nn.Parameter(torch.full([1], float(init_logit_scale)))
        self.logit_bias = None if init_logit_bias is None else nn.Parameter(torch.full([1], float(init_logit_bias)))
        # The float32 values of these two, by name, where a strategy trains in bf16 or float16 weights; it updates them after every step.
        self.exact: dict[str, Tensor] = {}

    def encode_image(self, image_BCHW: Tensor, normalize: bool = False) -> Tensor:
        """[B, D]; `normalize` gives float32 of unit norm. For the input see the image tower."""
        features_BD = self.image(image_BCHW)
        return unit_norm(features_BD) if normalize else features_BD

    def encode_text(self, tokens_BL: Tensor, normalize: bool = False) -> Tensor:
        """[B, D]; `normalize` gives float32 of unit norm. For the input see the text tower."""
        features_BD = self.text(tokens_BL)
        return unit_norm(features_BD) if normalize else features_BD

    @property
    def shares_prefixes(self) -> bool:
        """Whether `encode_text_trees` can be used: the text tower is causal and pooled at the end of the text."""
        return getattr(self.text, "shares_prefixes", False)

    def encode_text_trees(self, tokens_BN: Tensor, layout: tuple[Tensor, ...]) -> Tensor:
        """[E, D] float32 of unit norm, of texts that share their beginnings. For the input see the text tower."""
        return unit_norm(self.text(tokens_BN, layout))

    def forward(self, image_BCHW: Tensor, tokens_BL: Tensor, micro_batch_size: int | None = None) -> CLIPOutput:
        """Features of B pairs.

        Args:
            image_BCHW: see the image tower.
            tokens_BL: see the text tower.
            micro_batch_size: the most samples that a tower holds activations of; None: all.
        """
        return CLIPOutput(
            unit_norm(encode(self.image, image_BCHW, micro_batch_size)),
            unit_norm(encode(self.text, tokens_BL, micro_batch_size)),
            self._float32("logit_scale").exp(),
            None if self.logit_bias is None else self._float32("logit_bias"),
        )

    def _float32(self, name: str) -> Tensor:
        """Return the scale (its logarithm) or the bias in float32, with the gradient of its parameter; a bf16 scale near 14 has steps of 1.6%.

        A new tensor, since DeepSpeed takes parameters away again when the module that owns them returns.
        """
        value = getattr(self, name).to(torch.float32, copy=True)
        return value + (self.exact[name] - value.detach()) if name in self.exact else value


def build_model(
    config: ModelConfig,
    *,
    init_logit_scale: float = math.log(1 / 0.07),
    init_logit_bias: float | None = None,
    own_weights: Collection[str] = (),
) -> CLIP:
    """A model with fresh weights, drawn from torch's global generator.

    Args:
        config: see `ModelConfig`.
        init_logit_scale: natural logarithm of the initial factor of the cosines.
        init_logit_bias: None for the softmax loss.
        own_weights: towers, image and text, that start from the weights of their own library where `config` says so (`pretrained`);
            for the others nothing is fetched, which is right where other weights will be loaded.

    Raises:
        ConfigError: the numbers do not fit each other, or one is missing; or a backbone or its weights cannot be had.
    """
    if problems := broken_rules(config, "model."):
        raise ConfigError("\n".join(problems))
    return CLIP(
        config.image.build(config, "image" in own_weights),
        config.text.build(config, "text" in own_weights),
        init_logit_scale=init_logit_scale,
        init_logit_bias=init_logit_bias,
    )
