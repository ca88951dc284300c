"""From a model's configuration to the arguments of its towers."""

from typing import Any, TypeVar

from clip_exp.config.model_schema import Activation, ImageTowerConfig, ModelConfig, TextTowerConfig

T = TypeVar("T")


def activation_of(config: ModelConfig) -> Activation:
    """The towers' nonlinearity: gelu unless something says otherwise."""
    return config.activation or Activation.gelu


def required(value: T | None) -> T:
    """A field that `check_model` has seen to be there."""
    assert value is not None
    return value


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
