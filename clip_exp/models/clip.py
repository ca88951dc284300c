"""CLIP, a dual encoder (Radford et al. 2021): an image tower and a text tower with a shared feature space, and a learned temperature.

The towers come from any family (`models.families`). Here they are run, in micro-batches if needed, and their outputs are normalized.
The loss is not part of the model: it takes the `CLIPOutput` of `CLIP.forward`.
"""

import math
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType
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


class PreservedStatistics(AbstractContextManager[None]):
    """Context in which `tower` can process a chunk again without updating its batch normalization statistics a second time.

    The statistics are restored afterwards instead of being switched off, because `checkpoint` requires that the second forward pass
    saves the same tensors as the first.
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
    """Run `tower` on a batch, in chunks of `micro_batch_size` samples if a backward pass will follow.

    Only the output of a chunk is stored, and the chunk is computed again in the backward pass. So memory is needed for the activations
    of one chunk, while the gradient is that of the whole batch, as in GradCache (Gao et al. 2021). Plain gradient accumulation could
    not do that: the loss of a chunk needs the features of all others. Batch normalization uses the statistics of the chunk, and
    updates its running statistics once per chunk.

    Returns:
        Features [B, D], not normalized.
    """
    if micro_batch_size is None or len(x) <= micro_batch_size or not torch.is_grad_enabled():
        return tower(x)

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), PreservedStatistics(tower)

    chunks = x.split(micro_batch_size)
    return torch.cat([checkpoint(tower, chunk, use_reentrant=False, context_fn=contexts) for chunk in chunks])


def unit_norm(features_BD: Tensor) -> Tensor:
    """Return the features in float32 with unit norm, so that dot products are cosine similarities."""
    return F.normalize(features_BD.float(), dim=-1)


class CLIP(nn.Module):
    """Dual encoder of any two towers whose outputs have the same width.

    Args:
        image: tower that maps images to features [B, D].
        text: tower that maps token ids to features [B, D].
        init_logit_scale: natural logarithm of the initial factor of the cosine similarities.
        init_logit_bias: initial bias of the similarities; None for the softmax loss, where a bias would cancel out.
    """

    def __init__(
        self, image: nn.Module, text: nn.Module, *, init_logit_scale: float, init_logit_bias: float | None = None
    ) -> None:
        super().__init__()
        self.image = image
        self.text = text
        # The parameter is the logarithm of the factor, as in the paper. Its shape is [1] instead of [], because DeepSpeed cannot
        # broadcast a parameter without an axis.
        self.logit_scale = nn.Parameter(torch.full([1], float(init_logit_scale)))
        self.logit_bias = None if init_logit_bias is None else nn.Parameter(torch.full([1], float(init_logit_bias)))
        # Float32 values of the two parameters, by name, under strategies that round weights to bf16 or float16. The strategy updates
        # them after every step.
        self.exact: dict[str, Tensor] = {}

    def encode_image(self, image_BCHW: Tensor, normalize: bool = False) -> Tensor:
        """Return image features [B, D]; with `normalize`, in float32 with unit norm. The input is that of the image tower."""
        features_BD = self.image(image_BCHW)
        return unit_norm(features_BD) if normalize else features_BD

    def encode_text(self, tokens_BL: Tensor, normalize: bool = False) -> Tensor:
        """Return text features [B, D]; with `normalize`, in float32 with unit norm. The input is that of the text tower."""
        features_BD = self.text(tokens_BL)
        return unit_norm(features_BD) if normalize else features_BD

    @property
    def shares_prefixes(self) -> bool:
        """True if `encode_text_trees` can be used: the text tower is causal and pools at the end of the text."""
        return getattr(self.text, "shares_prefixes", False)

    def encode_text_trees(self, tokens_BN: Tensor, layout: tuple[Tensor, ...]) -> Tensor:
        """Return features [E, D] of texts that share prefixes, in float32 with unit norm. The input is that of the text tower."""
        return unit_norm(self.text(tokens_BN, layout))

    def forward(
        self,
        image_BCHW: Tensor,
        tokens_BL: Tensor,
        micro_batch_size: int | None = None,
        further_BL: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> CLIPOutput:
        """Encode B pairs, and return their features with the scale and bias for the loss.

        Args:
            image_BCHW: images, in the form that the image tower expects.
            tokens_BL: token ids, in the form that the text tower expects.
            micro_batch_size: largest number of samples whose activations a tower stores; None: no limit.
            further_BL: token ids of further texts by name, which are encoded with the captions. Their features are in `columns`.
        """
        image_BD = unit_norm(encode(self.image, image_BCHW, micro_batch_size))
        # One call, since DDP and ZeRO expect each weight to be used once, and larger batches are faster.
        texts_BD = unit_norm(encode(self.text, torch.cat([tokens_BL, *further_BL.values()]), micro_batch_size))
        text_BD, *others_BD = texts_BD.chunk(1 + len(further_BL))
        return CLIPOutput(
            image_BD,
            text_BD,
            self._float32("logit_scale").exp(),
            None if self.logit_bias is None else self._float32("logit_bias"),
            dict(zip(further_BL, others_BD, strict=True)),
        )

    def _float32(self, name: str) -> Tensor:
        """Return the logarithm of the scale, or the bias, in float32, with the gradient of its parameter.

        bf16 would be too coarse: a scale near 14 has steps of 1.6 %. The result is a new tensor, because ZeRO-3 frees parameters when the
        forward pass of the module that owns them returns.
        """
        value = getattr(self, name).to(torch.float32, copy=True)
        # The value is the exact one, and the gradient goes to the rounded parameter.
        return value + (self.exact[name] - value.detach()) if name in self.exact else value


def build_model(
    config: ModelConfig,
    *,
    init_logit_scale: float = math.log(1 / 0.07),
    init_logit_bias: float | None = None,
    own_weights: Collection[str] = (),
) -> CLIP:
    """Build a model with random weights, drawn from torch's global generator.

    Args:
        config: configuration of the model.
        init_logit_scale: natural logarithm of the initial factor of the cosine similarities.
        init_logit_bias: initial bias; None for the softmax loss.
        own_weights: towers (`image`, `text`) that load the pretrained weights of their own library if `config` says so. Nothing is
            downloaded for the others: leave a tower out if other weights will be loaded into it.

    Raises:
        ConfigError: values of the configuration are missing or inconsistent, or a backbone or its weights are not available.
    """
    if problems := broken_rules(config, "model."):
        raise ConfigError("\n".join(problems))
    return CLIP(
        config.image.build(config, "image" in own_weights),
        config.text.build(config, "text" in own_weights),
        init_logit_scale=init_logit_scale,
        init_logit_bias=init_logit_bias,
    )
