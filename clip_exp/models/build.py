"""From a model's configuration to the model."""

import math
from collections.abc import Collection

from clip_exp.config.base import broken_rules
from clip_exp.config.model import ModelConfig
from clip_exp.errors import ConfigError
from clip_exp.models.clip import CLIP


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
