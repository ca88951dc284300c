"""Any image backbone of the timm library as image tower (Wightman 2019), with a projection into the shared space."""

import difflib
from typing import Any

import torch
from torch import Tensor, nn

from clip_exp.config.model import ModelConfig, Projection
from clip_exp.errors import ConfigError

KEY = "model.image.name"
OPTIONS = {"patch_drop_rate": "model.image.patch_dropout", "proj_drop_rate": "model.dropout"}


class TimmTower(nn.Module):
    """Pictures to embeddings.

    Args:
        trunk: pictures to [B, channels].
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


def build_image_tower(config: ModelConfig, own_weights: bool = False) -> TimmTower:
    """The tower that `config.image` describes.

    Args:
        own_weights: fetch the backbone's weights where `config.image.pretrained` asks for them; otherwise nothing is fetched.

    Raises:
        ConfigError: no such backbone; a size, dropout or projection that it does not take; weights that cannot be had.
    """
    image = config.image
    name = known_backbone(image.name)
    options: dict[str, Any] = {}
    if image.patch_dropout:
        options["patch_drop_rate"] = image.patch_dropout
    if config.dropout:
        options["proj_drop_rate"] = config.dropout
    with torch.device("meta"):  # what the backbone makes of a picture is found out without computing anything
        probe = _create(name, image.image_size, options)
    channels = _channels(probe, name, image.image_size)
    if image.projection is Projection.none and channels != config.embed_dim:
        raise ConfigError(
            f"model.image.projection=none needs as many channels as the shared space: {name} has {channels}, and "
            f"model.embed_dim={config.embed_dim}. Set model.embed_dim={channels}, or a projection."
        )
    pretrained = image.pretrained and own_weights
    trunk = _fetch(name, image.image_size, options) if pretrained else _create(name, image.image_size, options)
    return TimmTower(trunk, channels, config.embed_dim, image.projection)


def known_backbone(name: str | None) -> str:
    """The name of a backbone, possibly with a tag of its weights: `vit_base_patch16_224.augreg_in21k`.

    Raises:
        ConfigError: timm has none of that name.
    """
    import timm

    name = name or ""
    if not timm.is_model(name):
        near = difflib.get_close_matches(name.partition(".")[0], timm.list_models(), n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "see timm.list_models() for the names."
        raise ConfigError(f"{KEY}={name}: timm has no such model: {hint}")
    try:
        timm.get_pretrained_cfg(name)
    except RuntimeError:
        raise ConfigError(f"{KEY}={name}: there are no such weights. {_tags(name)}") from None
    return name


def _tags(name: str) -> str:
    import timm

    found = timm.list_pretrained(f"{name.partition('.')[0]}.*")
    return (
        f"timm has {', '.join(found)}."
        if found
        else "timm has no weights of this model: use model.image.pretrained=false."
    )


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
        raise ConfigError(f"model.image.pretrained=true: {_tags(name)}")
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
