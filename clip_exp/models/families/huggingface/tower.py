"""The tower: an encoder of transformers, pooled and projected as open_clip's `HFTextEncoder` does it."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from clip_exp.config.model import ModelConfig, Pooler, Projection, folder_or_hub_name
from clip_exp.errors import ConfigError
from clip_exp.models.families.huggingface import (
    KEY,
    EncoderConfig,
    HuggingFaceTextConfig,
    not_loaded,
    note_architecture,
)

INPUTS = ("input_ids", "attention_mask")
# Whose attention or convolution takes padding in despite the mask: the features depend on how much of it there is.
NAMES_CODE = ("auto_map", "attn_implementation", "experts_implementation", "trust_remote_code", "quantization_config")
SEE_PADDING = ("convbert", "nystromformer", "yoso")
VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


class HuggingFaceText(nn.Module):
    """Token ids to embeddings.

    Padding is masked in the encoder and left out of the mean, so a batch may be cut to its longest text.

    Args:
        encoder: of transformers; from `input_ids` and `attention_mask` to `last_hidden_state`.
        embed_dim: of the shared space.
        pooler: how tokens become one vector.
        projection: linear, or an MLP half as wide as both its ends together, without biases.
    """

    def __init__(self, encoder: nn.Module, embed_dim: int, pooler: Pooler, projection: Projection) -> None:
        super().__init__()
        config: Any = encoder.config
        self.pad_id, self.pooler = config.pad_token_id, pooler
        self.encoder = encoder
        width = config.hidden_size
        self.projection: nn.Module
        match projection:
            case Projection.linear:
                self.projection = nn.Linear(width, embed_dim, bias=False)
            case Projection.mlp:
                hidden = (width + embed_dim) // 2
                self.projection = nn.Sequential(
                    nn.Linear(width, hidden, bias=False), nn.GELU(), nn.Linear(hidden, embed_dim, bias=False)
                )
            case Projection.none:
                self.projection = nn.Identity()

    def forward(self, tokens_BL: Tensor) -> Tensor:
        """Embeddings, not normalized.

        Args:
            tokens_BL: int64, of the encoder's own tokenizer, padded with its padding id.

        Returns:
            [B, embed_dim].
        """
        seen_BL = (tokens_BL != self.pad_id).long()
        output = self.encoder(input_ids=tokens_BL, attention_mask=seen_BL)
        match self.pooler:
            case Pooler.mean:
                seen_BL1 = seen_BL.unsqueeze(-1)
                pooled_BD = (output.last_hidden_state * seen_BL1).sum(dim=1) / seen_BL1.sum(dim=1)
            case Pooler.cls:
                pooled_BD = output.last_hidden_state[:, 0]
            case Pooler.own:
                pooled_BD = output.pooler_output
        return self.projection(pooled_BD)


def build_tower(text: HuggingFaceTextConfig, model: ModelConfig, own_weights: bool = False) -> HuggingFaceText:
    """Return the tower that a configuration describes.

    Args:
        own_weights: fetch the encoder's weights where `text.pretrained` says so; otherwise nothing is fetched where
            `text.architecture` is noted.

    Raises:
        ConfigError: the encoder cannot be had, or does not fit the configuration.
    """
    architecture = encoder_config(text, model.dropout)
    if text.projection is Projection.none and architecture.hidden_size != model.embed_dim:
        raise ConfigError(
            f"model.text.projection=none needs as many channels as the shared space: {text.name} has "
            f"{architecture.hidden_size}, and model.embed_dim={model.embed_dim}. Set model.embed_dim={architecture.hidden_size}, "
            "or a projection."
        )
    with_pooler = text.pooler is Pooler.own
    name = text.name if own_weights and text.pretrained else None
    encoder = build_encoder(architecture, with_pooler, weights_of=name)
    if with_pooler and getattr(encoder, "pooler", None) is None:
        raise ConfigError(f"model.text.pooler=own: {text.name} has no pooler of its own. Use mean or cls.")
    check_encoder(encoder, text)
    if not with_pooler and getattr(encoder, "pooler", None) is not None:
        encoder.pooler.requires_grad_(False)  # some have one that cannot be left out, and DDP waits for every gradient
    return HuggingFaceText(encoder, model.embed_dim, text.pooler, text.projection)


def encoder_config(text: EncoderConfig, dropout: float = 0.0) -> Any:
    """The encoder's `PretrainedConfig`, with the model's dropout in the place of its own.

    Raises:
        ConfigError: it cannot be had, or has no padding.
    """
    from transformers import AutoConfig

    noted = text.architecture or note_architecture(text.name or "")
    # A third party's file may note an architecture: what names code to load is left out.
    values: dict[str, Any] = {
        key: value for key, value in noted.items() if not key.startswith("_") and key not in NAMES_CODE
    }
    try:
        config = AutoConfig.for_model(values.pop("model_type"), **values)
    except Exception as error:  # each architecture checks its numbers in a way of its own
        raise ConfigError(f"model.text.architecture is not of an encoder that transformers knows ({error}).") from error
    for key, value in config.to_dict().items():
        if "dropout" in key and isinstance(value, int | float) and not isinstance(value, bool):
            setattr(config, key, dropout)
        elif "layerdrop" in key:
            setattr(config, key, 0.0)
    if getattr(config, "pad_token_id", None) is None:
        raise ConfigError(
            f"{KEY}={text.name} has no pad_token_id in its configuration, which tells padding from words."
        )
    return config


def check_encoder(encoder: Any, text: EncoderConfig) -> None:
    """See that an encoder takes texts of `context_length` tokens, and nothing else, and how much padding it is given.

    Raises:
        ConfigError: it does not.
    """
    taken = inspect.signature(encoder.forward).parameters
    if missing := [name for name in INPUTS if name not in taken]:
        raise ConfigError(
            f"{KEY}={text.name} takes no {' and no '.join(missing)}: it is no text encoder that can be told what is padding. Name another."
        )
    if needed := [
        name for name, of in taken.items() if of.default is of.empty and of.kind not in VARIABLE and name not in INPUTS
    ]:
        raise ConfigError(
            f"{KEY}={text.name} needs {' and '.join(needed)} beside a text's tokens. Name a text encoder."
        )
    positions = _positions(encoder)
    if positions is not None and text.context_length > positions:
        raise ConfigError(
            f"model.text.context_length={text.context_length} is more than the {positions} tokens that {text.name} has "
            "positions for."
        )
    if text.trim and encoder.config.model_type in SEE_PADDING:
        raise ConfigError(
            f"model.text.trim=true would change the features of {text.name}, which depend on the padding: set model.text.trim=false."
        )


def _positions(encoder: Any) -> int | None:
    """The most tokens of a text; None: any number."""
    for name, module in encoder.named_modules():
        if name.rpartition(".")[2] == "position_embeddings" and hasattr(module, "weight"):
            # RoBERTa and its kin count positions from the padding id on, and only their tables have one.
            padding = getattr(module, "padding_idx", None)
            return len(module.weight) - (0 if padding is None else padding + 1)
    positions = getattr(encoder.config, "max_position_embeddings", None)
    return positions if positions is not None and positions > 0 else None  # XLNet says -1


def build_encoder(config: Any, with_pooler: bool, weights_of: str | None = None) -> nn.Module:
    """An encoder of transformers in float32; of an encoder and decoder, the encoder.

    Args:
        config: `PretrainedConfig`.
        with_pooler: keep the encoder's own pooler, where it has one.
        weights_of: a folder, or a name on the hub, whose safetensors to start from; None: fresh ones.

    Raises:
        ConfigError: the weights cannot be had, or do not cover the encoder.
    """
    from transformers import MODEL_MAPPING, AutoModel

    model_class: Any = MODEL_MAPPING.get(type(config), None)
    if not isinstance(model_class, type):
        raise ConfigError(f"{KEY}: transformers has no plain model of type {config.model_type}. Name a text encoder.")
    takes_pooler = "add_pooling_layer" in inspect.signature(model_class).parameters
    options = {"add_pooling_layer": with_pooler} if takes_pooler else {}
    if weights_of is None:
        try:
            model = AutoModel.from_config(config, dtype=torch.float32, **options)
        except Exception as error:  # likewise
            raise ConfigError(
                f"model.text.architecture cannot be built ({type(error).__name__}: {error}). Check its numbers against the encoder's config.json."
            ) from error
    else:
        model = _fetch(weights_of, config, options)
    return model.get_encoder() if config.is_encoder_decoder else model


def _fetch(name: str, config: Any, options: dict[str, Any]) -> Any:
    """The encoder with its weights. Only safetensors are read: no file of a repository can run code."""
    from transformers import AutoModel

    try:
        with _quietly():
            model, told = AutoModel.from_pretrained(
                folder_or_hub_name(name),
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                **options,
            )
    except Exception as error:  # the hub's client and the file's reader fail in ways of their own
        raise ConfigError(
            f"{not_loaded(name, error)} Weights are read from safetensors only; model.text.pretrained=false starts without them."
        ) from error
    if missing := [*told["missing_keys"], *told.get("mismatched_keys", [])]:
        raise ConfigError(
            f"{KEY}={name}: its weights do not cover the encoder: {', '.join(sorted(map(str, missing))[:5])}. Use another "
            "model.text.pooler or encoder, or model.text.pretrained=false."
        )
    return model


@contextmanager
def _quietly() -> Iterator[None]:
    """Without transformers' report of what was loaded: what is missing is an error here, what is left over has no use."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
