"""The tower: a backbone of timm without its classifier, and a projection."""

from typing import Any

import torch
from torch import Tensor, nn

from clip_exp.config.model import ModelConfig, Projection
from clip_exp.errors import ConfigError
from clip_exp.models.families.timm import KEY, TimmConfig, known_backbone, tags_of

OPTIONS = {"patch_drop_rate": "model.image.patch_dropout", "proj_drop_rate": "model.dropout"}


class TimmTower(nn.Module):
    """Images to embeddings.

    Args:
        trunk: images to [B, channels].
        channels: of the trunk.
        embed_dim: of the shared space.
        projection: linear, or an MLP as wide as twice the shared space; both end without a bias, as open_clip's.
    """

    def __init__(self, trunk: nn.Module, channels: int, embed_dim: int, projection: Projection) -> None:
        super().__init__()
        self.trunk = trunk
        self.projection: nn.Module
        match projection:
            case Projection.linear:
                self.projection = nn.Linear(channels, embed_dim, bias=False)
            case Projection.mlp:
                hidden = 2 * embed_dim
                self.projection = nn.Sequential(
                    nn.Linear(channels, hidden), nn.GELU(), nn.Linear(hidden, embed_dim, bias=False)
                )
            case Projection.none:
                self.projection = nn.Identity()

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Embeddings, not normalized.

        Args:
            image_BCHW: float, less the mean and over the standard deviation of its channels, `image_size` on a side.

        Returns:
            [B, embed_dim].
        """
        return self.projection(self.trunk(image_BCHW))


def build_tower(image: TimmConfig, model: ModelConfig, own_weights: bool = False) -> TimmTower:
    """Return the tower that a configuration describes.

    Args:
        own_weights: fetch the backbone's weights where `image.pretrained` says so; otherwise nothing is fetched.

    Raises:
        ConfigError: no such backbone; a size, dropout or projection that it does not take; weights that cannot be had.
    """
    name = known_backbone(image.name)
    options: dict[str, Any] = {}
    if image.patch_dropout:
        options["patch_drop_rate"] = image.patch_dropout
    if model.dropout:
        options["proj_drop_rate"] = model.dropout
    with torch.device("meta"):  # what the backbone makes of an image is found out without computing anything
        probe = _create(name, image.image_size, options)
    channels = _channels(probe, name, image.image_size)
    if image.projection is Projection.none and channels != model.embed_dim:
        raise ConfigError(
            f"model.image.projection=none needs as many channels as the shared space: {name} has {channels}, and "
            f"model.embed_dim={model.embed_dim}. Set model.embed_dim={channels}, or a projection."
        )
    pretrained = image.pretrained and own_weights
    trunk = _fetch(name, image.image_size, options) if pretrained else _create(name, image.image_size, options)
    return TimmTower(trunk, channels, model.embed_dim, image.projection)


def _create(name: str, size: int, options: dict[str, Any], pretrained: bool = False) -> nn.Module:
    """The backbone without its classifier. Convolutional ones take any size, and have no argument for it."""
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
        raise ConfigError(f"{KEY}={name} has nothing that {wrong} could act on: leave it at 0.") from error
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
    return ConfigError(f"model.image.image_size={size} does not fit {name} ({why}). Its own size is {own}.")


def _fetch(name: str, size: int, options: dict[str, Any]) -> nn.Module:
    """The backbone with its own weights, from the hub or from where the hub's client keeps them."""
    import timm

    if not timm.is_model_pretrained(name):
        raise ConfigError(f"model.image.pretrained=true: {tags_of(name)}")
    try:
        return _create(name, size, options, pretrained=True)
    except ConfigError:
        raise
    except Exception as error:  # the hub's client and the file's reader fail in many ways
        why = " ".join(str(error).split()).rstrip(".")
        raise ConfigError(
            f"the weights of {KEY}={name} cannot be had ({type(error).__name__}: {why}). "
            "Try again where the hub can be reached, or use model.image.pretrained=false."
        ) from error
