"""Builders of the towers of open_clip's configurations, by open_clip's own code."""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clip_exp.config.model import Activation, ModelConfig
from clip_exp.errors import ConfigError
from clip_exp.models.families.huggingface.tower import build_encoder, check_encoder, encoder_config
from clip_exp.models.families.open_clip import OpenCLIPImageConfig, OpenCLIPTextConfig
from clip_exp.open_clip_files import open_clip_values


def build_image_tower(image: OpenCLIPImageConfig, config: ModelConfig, own_weights: bool = False) -> nn.Module:
    """Build open_clip's image tower (`visual`) of `config.open_clip_name`, for images of side `image.image_size`.

    Args:
        image: configuration of the tower.
        config: configuration of the model.
        own_weights: whether the pretrained weights of a timm backbone are loaded if `image.pretrained` is set.

    Raises:
        ConfigError: open_clip has no such configuration, or it does not support a requested value.
    """
    from open_clip.model import _build_vision_tower

    values = open_clip_values(config.open_clip_name)
    if image.patch_dropout and isinstance(values["vision_cfg"].get("layers"), list):
        raise ConfigError(
            f"model.name={config.open_clip_name}: a ResNet has no patches: set model.image.patch_dropout=0."
        )
    vision = {**values["vision_cfg"], **_act(config), "output_tokens": False}
    resized = image.image_size != vision["image_size"]
    vision["image_size"] = image.image_size
    if image.patch_dropout:
        vision["patch_dropout"] = image.patch_dropout
    if "timm_model_name" in vision:
        return _timm_tower(image, config, vision, resized, own_weights and image.pretrained)
    return _build_vision_tower(config.embed_dim, vision, _quick_gelu(config, values))


def _timm_tower(
    image: OpenCLIPImageConfig, config: ModelConfig, vision: dict[str, Any], resized: bool, pretrained: bool
) -> nn.Module:
    from open_clip.model import _build_vision_tower

    size = image.image_size

    def build(pretrained: bool) -> nn.Module:
        visual = _build_vision_tower(config.embed_dim, {**vision, "timm_model_pretrained": pretrained})
        if resized:
            visual.set_input_size(size)
        return visual

    try:
        with torch.device("meta"), torch.no_grad():  # check that it accepts such images, without computing anything
            build(False).eval()(torch.zeros(1, 3, size, size))
        return build(pretrained)
    except Exception as error:  # timm's backbones and the hub client raise different exceptions
        why = " ".join(str(error).split()).rstrip(".")
        raise ConfigError(
            f"model.name={config.open_clip_name}: its backbone {vision['timm_model_name']} cannot be built with model.image."
            f"image_size={size}, patch_dropout={image.patch_dropout:g}, pretrained={str(image.pretrained).lower()} ({why})."
        ) from error


def build_text_tower(text_config: OpenCLIPTextConfig, config: ModelConfig, own_weights: bool = False) -> nn.Module:
    """Build open_clip's text tower (`text`) of `config.open_clip_name`, for tokens [B, L] with any L up to `context_length`.

    Args:
        text_config: configuration of the tower.
        config: configuration of the model.
        own_weights: whether the pretrained weights of a Hugging Face encoder are loaded if `text_config.pretrained` is set.

    Raises:
        ConfigError: open_clip has no such configuration, or its encoder could not be loaded.
    """
    from open_clip.model import _build_text_tower

    values = open_clip_values(config.open_clip_name)
    text = {
        **values["text_cfg"],
        **_act(config),
        "context_length": text_config.context_length,
        "vocab_size": text_config.vocab_size,
        "output_tokens": False,
    }
    if "hf_model_name" in text:
        return _huggingface_tower(text_config, config, text, own_weights)
    if config.dropout:
        raise ConfigError(
            f"model.name={config.open_clip_name}: open_clip's towers have no dropout: set model.dropout=0."
        )
    tower = _build_text_tower(config.embed_dim, text, _quick_gelu(config, values))
    if getattr(tower, "attn_mask", None) is not None:
        tower.transformer.register_forward_pre_hook(_cut_mask, with_kwargs=True)
    return tower


def _huggingface_tower(
    text_config: OpenCLIPTextConfig, config: ModelConfig, text: dict[str, Any], own_weights: bool
) -> nn.Module:
    """Build the tower from the encoder's configuration in a temporary folder, so that open_clip does not access the hub."""
    from open_clip.model import _build_text_tower

    architecture = encoder_config(text_config, config.dropout)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(architecture.to_dict(), default=str), encoding="utf-8")
        tower = _build_text_tower(config.embed_dim, {**text, "hf_model_name": folder, "hf_model_pretrained": False})
    check_encoder(tower.transformer, text_config)
    if own_weights and text_config.pretrained:
        with_pooler = text.get("hf_pooler_type") == "cls_pooler"
        tower.transformer = build_encoder(architecture, with_pooler, weights_of=text_config.name)
    return tower


def _cut_mask(module: nn.Module, arguments: tuple[Tensor, ...], options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Trim the causal mask to the number of tokens, since open_clip's towers expect whole contexts."""
    length, mask = arguments[0].shape[1], options["attn_mask"]
    return arguments, {**options, "attn_mask": None if mask is None else mask[..., :length, :length]}


def _quick_gelu(config: ModelConfig, values: dict[str, Any]) -> bool:
    if config.activation is None:
        return values.get("quick_gelu", False)
    return config.activation is Activation.quick_gelu


def _act(config: ModelConfig) -> dict[str, Any]:
    """Return the keys of open_clip's configuration that the configured activation changes; QuickGELU takes no arguments."""
    match config.activation:
        case Activation.gelu_tanh:
            return {"act_kwargs": {"approximate": "tanh"}}
        case Activation.quick_gelu:
            return {"act_kwargs": None}
    return {}
