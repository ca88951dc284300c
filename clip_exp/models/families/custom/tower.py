"""Construction of a tower from the user's module, with a projection to the shared space."""

import torch
from torch import Tensor, nn

from clip_exp.config.model import ModelConfig, Projection
from clip_exp.config.targets import failure, instantiate
from clip_exp.errors import ConfigError
from clip_exp.models.families.custom import CustomImageConfig, CustomTextConfig
from clip_exp.models.layers import ProjectedTower, build_projection


def build_tower(
    tower: CustomImageConfig | CustomTextConfig,
    key: str,
    model: ModelConfig,
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> ProjectedTower:
    """Build the tower of a configuration.

    Args:
        tower: configuration of the tower.
        key: its key, for messages.
        model: configuration of the model, whose values are passed for parameters of the names in `tower.optional`.
        shape: shape of a sample, with which the number of channels is determined.
        dtype: its dtype.

    Raises:
        ConfigError: the module cannot be created, is not a module, or does not return features [B, channels].
    """
    values = {**model.model_dump(include={"embed_dim"}), **tower.model_dump(include=set(tower.optional))}
    # Modules may load their weights when they are created, which the meta device of a rehearsal does not allow.
    with torch.device("cpu"):
        trunk = instantiate(tower, key, optional=values)
        if not isinstance(trunk, nn.Module):
            raise ConfigError(
                f"{key}: {tower.target} returned {type(trunk).__name__}, but a torch.nn.Module is required."
            )
        channels = _channels(trunk, tower.target, key, torch.ones(2, *shape, dtype=dtype))
        if tower.projection is Projection.none and channels != model.embed_dim:
            raise ConfigError(
                f"{key}.projection=none requires that the features of {tower.target} have model.embed_dim={model.embed_dim} channels, "
                f"but they have {channels}. Set model.embed_dim={channels}, or a projection."
            )
        return ProjectedTower(trunk, build_projection(channels, model.embed_dim, tower.projection))


def _channels(trunk: nn.Module, target: str, key: str, example: Tensor) -> int:
    try:
        with torch.no_grad():
            features = trunk.eval()(example)
    except Exception as error:
        raise ConfigError(
            f"{key}: {target} fails on a batch of {list(example.shape)} ({failure(error).removesuffix('.')}). Its forward takes one tensor."
        ) from error
    finally:
        trunk.train()
    if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(example):
        shape = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ConfigError(
            f"{key}: {target} returned {shape} for {len(example)} samples, but features [B, channels] are required."
        )
    return features.shape[1]
