"""From a model's configuration to the model."""

import math

from torch import nn

from clip_exp.config.base import broken_rules
from clip_exp.config.model import ImageTower, ModelConfig, TextTower
from clip_exp.errors import ConfigError
from clip_exp.models import huggingface, open_clip_towers, resnet, siglip, text, timm_tower, vit
from clip_exp.models.clip import CLIP


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
    if problems := broken_rules(config, "model."):
        raise ConfigError("\n".join(problems))
    return CLIP(
        _image_tower(config, own_weights),
        _text_tower(config, own_weights),
        init_logit_scale=init_logit_scale,
        init_logit_bias=init_logit_bias,
    )


def _image_tower(config: ModelConfig, own_weights: bool) -> nn.Module:
    match config.image.kind:
        case ImageTower.vit:
            return vit.build_image_tower(config)
        case ImageTower.resnet:
            return resnet.build_image_tower(config)
        case ImageTower.siglip:
            return siglip.build_image_tower(config)
        case ImageTower.timm:
            return timm_tower.build_image_tower(config, own_weights)
        case ImageTower.open_clip:
            return open_clip_towers.build_image_tower(config, own_weights)


def _text_tower(config: ModelConfig, own_weights: bool) -> nn.Module:
    match config.text.kind:
        case TextTower.clip:
            return text.build_text_tower(config)
        case TextTower.siglip:
            return siglip.build_text_tower(config)
        case TextTower.huggingface:
            return huggingface.build_text_tower(config, own_weights)
        case TextTower.open_clip:
            return open_clip_towers.build_text_tower(config, own_weights)
