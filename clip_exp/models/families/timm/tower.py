"""Image tower: a backbone of timm without its classifier, and a projection."""

from typing import Any

import torch
from torch import nn

from clip_exp.config.model import ModelConfig, Projection
from clip_exp.errors import ConfigError
from clip_exp.models.families.timm import KEY, TimmConfig, known_backbone, tags_of
from clip_exp.models.layers import ProjectedTower, build_projection

OPTIONS = {"patch_drop_rate": "model.image.patch_dropout", "proj_drop_rate": "model.dropout"}


def build_tower(image: TimmConfig, model: ModelConfig, own_weights: bool = False) -> ProjectedTower:
    """Build the image tower of a configuration.

    Args:
        image: configuration of the tower.
        model: configuration of the model.
        own_weights: whether the backbone's pretrained weights are loaded if `image.pretrained` is set; otherwise nothing is downloaded.

    Raises:
        ConfigError: the backbone is unknown, its weights are not available, or it does not support the size, dropout or projection.
    """
    name = known_backbone(image.name)
    options: dict[str, Any] = {}
    if image.patch_dropout:
        options["patch_drop_rate"] = image.patch_dropout
    if model.dropout:
        options["proj_drop_rate"] = model.dropout
    with torch.device("meta"):  # to find out the output shape without computing anything
        probe = _create(name, image.image_size, options)
    channels = _channels(probe, name, image.image_size)
    if image.projection is Projection.none and channels != model.embed_dim:
        raise ConfigError(
            f"model.image.projection=none requires that {name} has as many channels as the shared space, but it has {channels}, and "
            f"model.embed_dim={model.embed_dim}. Set model.embed_dim={channels}, or a projection."
        )
    pretrained = image.pretrained and own_weights
    trunk = _fetch(name, image.image_size, options) if pretrained else _create(name, image.image_size, options)
    return ProjectedTower(trunk, build_projection(channels, model.embed_dim, image.projection))


def _create(name: str, size: int, options: dict[str, Any], pretrained: bool = False) -> nn.Module:
    """Create the backbone without its classifier. Convolutional backbones accept any size, and have no argument for it."""
    import timm

    try:
        try:
            return timm.create_model(name, pretrained=pretrained, num_classes=0, img_size=size, **options)
        except TypeError as error:
            if "'img_size'" not in str(error):
                raise
            return timm.create_model(name, pretrained=pretrained, num_classes=0, **options)
    except TypeError as error:
        wrong = next((key for option, key in OPTIONS.items() if f"'{option}'" in str(error)), None)
        if wrong is None:
            raise
        raise ConfigError(f"{wrong} is not supported by {KEY}={name}: set it to 0.") from error
    except (AssertionError, ValueError) as error:
        raise _wrong_size(name, size, error) from error


def _channels(probe: nn.Module, name: str, size: int) -> int:
    try:
        with torch.no_grad():
            features_BD = probe.eval()(torch.zeros(1, 3, size, size, device="meta"))
    except (AssertionError, ValueError, RuntimeError) as error:
        raise _wrong_size(name, size, error) from error
    return features_BD.shape[1]


def _wrong_size(name: str, size: int, error: Exception) -> ConfigError:
    import timm

    own = timm.get_pretrained_cfg(name).input_size[-1]
    why = " ".join(str(error).split()).rstrip(".")
    return ConfigError(f"model.image.image_size={size} does not fit {name} ({why}). Its default size is {own}.")


def _fetch(name: str, size: int, options: dict[str, Any]) -> nn.Module:
    """Create the backbone with its pretrained weights, from the hub or the cache of the hub client."""
    import timm

    if not timm.is_model_pretrained(name):
        raise ConfigError(f"model.image.pretrained=true: {tags_of(name)}")
    try:
        return _create(name, size, options, pretrained=True)
    except ConfigError:
        raise
    except Exception as error:  # the hub client and the file reader raise different exceptions
        why = " ".join(str(error).split()).rstrip(".")
        raise ConfigError(
            f"the weights of {KEY}={name} could not be loaded ({type(error).__name__}: {why}). "
            "Try again with access to the hub, or set model.image.pretrained=false."
        ) from error
