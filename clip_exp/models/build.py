"""From a model's configuration to the model."""

import math
from typing import Any, TypeVar

from torch import nn

from clip_exp.config.model_schema import (
    Activation,
    ImageTower,
    ImageTowerConfig,
    ModelConfig,
    TextTower,
    TextTowerConfig,
)
from clip_exp.config.preflight_model import check_model
from clip_exp.errors import ConfigError
from clip_exp.models.clip import CLIP
from clip_exp.models.text import TextTransformer
from clip_exp.models.vit import VisionTransformer

T = TypeVar("T")


def build_model(
    config: ModelConfig,
    *,
    init_logit_scale: float = math.log(1 / 0.07),
    init_logit_bias: float | None = None,
    own_weights: bool = False,
) -> CLIP:
    """A model with fresh weights, drawn from torch's global generator.

    Args:
        config: see `ModelConfig`.
        init_logit_scale: natural logarithm of the initial factor of the cosines.
        init_logit_bias: None for the softmax loss.
        own_weights: towers of other libraries start from those libraries' weights where `config` says so (`pretrained`);
            otherwise nothing is fetched, which is right where other weights will be loaded.

    Raises:
        ConfigError: the numbers do not fit each other, or one is missing; or a backbone or its weights cannot be had.
    """
    if problems := check_model(config):
        raise ConfigError("\n".join(problems))
    return CLIP(
        _image_tower(config, own_weights),
        _text_tower(config, own_weights),
        init_logit_scale=init_logit_scale,
        init_logit_bias=init_logit_bias,
    )


def activation_of(config: ModelConfig) -> Activation:
    """The towers' nonlinearity: gelu unless something says otherwise."""
    return config.activation or Activation.gelu


def required(value: T | None) -> T:
    """A field that `check_model` has seen to be there."""
    assert value is not None
    return value


def _image_tower(config: ModelConfig, own_weights: bool) -> nn.Module:
    match config.image.kind:
        case ImageTower.vit:
            return VisionTransformer(embed_dim=config.embed_dim, **patch_transformer(config))
        case ImageTower.resnet:
            from clip_exp.models import resnet

            return resnet.build_image_tower(config)
        case ImageTower.siglip:
            from clip_exp.models import siglip

            return siglip.build_image_tower(config)
        case ImageTower.timm:
            from clip_exp.models import timm_tower

            return timm_tower.build_image_tower(config, own_weights)
        case ImageTower.open_clip:
            from clip_exp.models import open_clip_towers

            return open_clip_towers.build_image_tower(config, own_weights)


def _text_tower(config: ModelConfig, own_weights: bool) -> nn.Module:
    match config.text.kind:
        case TextTower.clip:
            return TextTransformer(**token_transformer(config))
        case TextTower.siglip:
            from clip_exp.models import siglip

            return siglip.build_text_tower(config)
        case TextTower.huggingface:
            from clip_exp.models import huggingface

            return huggingface.build_text_tower(config, own_weights)
        case TextTower.open_clip:
            from clip_exp.models import open_clip_towers

            return open_clip_towers.build_text_tower(config, own_weights)


def patch_transformer(config: ModelConfig) -> dict[str, Any]:
    """The arguments of an image tower that is a transformer over patches."""
    image = config.image
    return {
        "image_size": image.image_size,
        "patch_size": required(image.patch_size),
        "patch_dropout": image.patch_dropout,
        **_transformer(config, image),
    }


def token_transformer(config: ModelConfig) -> dict[str, Any]:
    """The arguments of a text tower that is a transformer over tokens."""
    text = config.text
    return {
        "context_length": text.context_length,
        "vocab_size": text.vocab_size,
        "embed_dim": config.embed_dim,
        **_transformer(config, text),
    }


def _transformer(config: ModelConfig, tower: ImageTowerConfig | TextTowerConfig) -> dict[str, Any]:
    return {
        "width": required(tower.width),
        "layers": required(tower.layers),
        "heads": required(tower.heads),
        "mlp_ratio": tower.mlp_ratio,
        "activation": activation_of(config),
        "dropout": config.dropout,
    }
