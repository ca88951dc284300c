"""From a model's configuration to the model."""

import math

from clip_exp.config.schema import ModelConfig
from clip_exp.errors import ConfigError
from clip_exp.models.clip import CLIP
from clip_exp.models.text import TextTransformer
from clip_exp.models.vit import VisionTransformer


def build_model(
    config: ModelConfig, *, init_logit_scale: float = math.log(1 / 0.07), init_logit_bias: float | None = None
) -> CLIP:
    """A model with fresh weights, drawn from torch's global generator.

    Args:
        config: see `ModelConfig`.
        init_logit_scale: natural logarithm of the initial factor of the cosines.
        init_logit_bias: None for the softmax loss.

    Raises:
        ConfigError: the numbers do not fit each other.
    """
    _check(config)
    image = VisionTransformer(
        image_size=config.image.image_size,
        patch_size=config.image.patch_size,
        width=config.image.width,
        layers=config.image.layers,
        heads=config.image.heads,
        mlp_ratio=config.image.mlp_ratio,
        embed_dim=config.embed_dim,
        activation=config.activation,
        dropout=config.dropout,
    )
    text = TextTransformer(
        context_length=config.text.context_length,
        vocab_size=config.text.vocab_size,
        width=config.text.width,
        layers=config.text.layers,
        heads=config.text.heads,
        mlp_ratio=config.text.mlp_ratio,
        embed_dim=config.embed_dim,
        activation=config.activation,
        dropout=config.dropout,
    )
    return CLIP(image, text, init_logit_scale=init_logit_scale, init_logit_bias=init_logit_bias)


def _check(config: ModelConfig) -> None:
    problems = []
    image, text = config.image, config.text
    if image.image_size % image.patch_size:
        problems.append(f"model.image.image_size={image.image_size} is no multiple of patch_size={image.patch_size}")
    problems += [
        f"model.{tower}.width={width} is no multiple of heads={heads}"
        for tower, width, heads in [("image", image.width, image.heads), ("text", text.width, text.heads)]
        if width % heads
    ]
    if problems:
        raise ConfigError("\n".join(problems))
