"""Text tower: an encoder of transformers with the pooling and projection of open_clip's `HFTextEncoder`."""

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
# Keys of a configuration that can name code to load.
NAMES_CODE = ("auto_map", "attn_implementation", "experts_implementation", "trust_remote_code", "quantization_config")
# Architectures whose attention or convolution includes padding in spite of the mask, so features depend on the amount of padding.
SEE_PADDING = ("convbert", "nystromformer", "yoso")
VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


class HuggingFaceText(nn.Module):
    """Text tower that maps token ids to features.

    Padding is masked in the encoder and excluded from the mean, so a batch can be trimmed to its longest text.

    Args:
        encoder: encoder of transformers, which maps `input_ids` and `attention_mask` to `last_hidden_state`.
        embed_dim: width of the shared space.
        pooler: pooling of the tokens to one vector.
        projection: linear, or an MLP without biases whose hidden width is the mean of its input and output widths.
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
        """Return features, not normalized.

        Args:
            tokens_BL: int64, from the encoder's tokenizer, padded with its padding id.

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
    """Build the text tower of a configuration.

    Args:
        text: configuration of the tower.
        model: configuration of the model.
        own_weights: whether the encoder's pretrained weights are loaded if `text.pretrained` is set. Otherwise nothing is downloaded if
            `text.architecture` is recorded.

    Raises:
        ConfigError: the encoder could not be loaded, or does not fit the configuration.
    """
    architecture = encoder_config(text, model.dropout)
    if text.projection is Projection.none and architecture.hidden_size != model.embed_dim:
        raise ConfigError(
            f"model.text.projection=none requires that {text.name} has as many channels as the shared space, but it has "
            f"{architecture.hidden_size}, and model.embed_dim={model.embed_dim}. Set model.embed_dim={architecture.hidden_size}, "
            "or a projection."
        )
    with_pooler = text.pooler is Pooler.own
    name = text.name if own_weights and text.pretrained else None
    encoder = build_encoder(architecture, with_pooler, weights_of=name)
    if with_pooler and getattr(encoder, "pooler", None) is None:
        raise ConfigError(f"model.text.pooler=own: {text.name} has no pooler. Use mean or cls.")
    check_encoder(encoder, text)
    if not with_pooler and getattr(encoder, "pooler", None) is not None:
        # Some encoders always have a pooler. Unused, it must not be trained: DDP waits for the gradient of every parameter.
        encoder.pooler.requires_grad_(False)
    return HuggingFaceText(encoder, model.embed_dim, text.pooler, text.projection)


def encoder_config(text: EncoderConfig, dropout: float = 0.0) -> Any:
    """Return the encoder's `PretrainedConfig`, with the dropout of the model instead of its own.

    Raises:
        ConfigError: the configuration could not be loaded, or has no padding id.
    """
    from transformers import AutoConfig

    recorded = text.architecture or note_architecture(text.name or "")
    # The architecture may come from a third-party file: drop keys that name code to load.
    values: dict[str, Any] = {
        key: value for key, value in recorded.items() if not key.startswith("_") and key not in NAMES_CODE
    }
    try:
        config = AutoConfig.for_model(values.pop("model_type"), **values)
    except Exception as error:  # each architecture validates its values differently
        raise ConfigError(f"model.text.architecture is not a valid encoder of transformers ({error}).") from error
    for key, value in config.to_dict().items():
        if "dropout" in key and isinstance(value, int | float) and not isinstance(value, bool):
            setattr(config, key, dropout)
        elif "layerdrop" in key:
            setattr(config, key, 0.0)
    if getattr(config, "pad_token_id", None) is None:
        raise ConfigError(
            f"{KEY}={text.name} has no pad_token_id in its configuration, which is needed to mask padding. Use another encoder."
        )
    return config


def check_encoder(encoder: Any, text: EncoderConfig) -> None:
    """Check that an encoder accepts texts of `context_length` tokens, needs no other inputs, and can be trimmed if configured.

    Raises:
        ConfigError: the encoder does not meet these requirements.
    """
    taken = inspect.signature(encoder.forward).parameters
    if missing := [name for name in INPUTS if name not in taken]:
        raise ConfigError(
            f"{KEY}={text.name} does not accept {' or '.join(missing)}, so it cannot be used as a text encoder. Use another encoder."
        )
    if needed := [
        name for name, of in taken.items() if of.default is of.empty and of.kind not in VARIABLE and name not in INPUTS
    ]:
        raise ConfigError(
            f"{KEY}={text.name} requires {' and '.join(needed)} in addition to tokens. Use a text encoder."
        )
    positions = _positions(encoder)
    if positions is not None and text.context_length > positions:
        raise ConfigError(
            f"model.text.context_length={text.context_length} must be at most {positions}, the number of positions of {text.name}."
        )
    if text.trim and encoder.config.model_type in SEE_PADDING:
        raise ConfigError(
            f"model.text.trim=true would change the features of {text.name}, which depend on padding: set model.text.trim=false."
        )


def _positions(encoder: Any) -> int | None:
    """Return the largest number of tokens of a text; None if it is unlimited."""
    for name, module in encoder.named_modules():
        if name.rpartition(".")[2] == "position_embeddings" and hasattr(module, "weight"):
            # RoBERTa and similar encoders number positions from the padding id on; only their embeddings have a padding_idx.
            padding = getattr(module, "padding_idx", None)
            return len(module.weight) - (0 if padding is None else padding + 1)
    positions = getattr(encoder.config, "max_position_embeddings", None)
    return positions if positions is not None and positions > 0 else None  # XLNet says -1


def build_encoder(config: Any, with_pooler: bool, weights_of: str | None = None) -> nn.Module:
    """Build an encoder of transformers in float32; for encoder-decoder models, only the encoder.

    Args:
        config: `PretrainedConfig` of the encoder.
        with_pooler: whether the encoder's pooler is included, if it has one.
        weights_of: folder, or name on the hub, with safetensors to load; None: random weights.

    Raises:
        ConfigError: the weights could not be loaded, or do not cover the encoder.
    """
    from transformers import MODEL_MAPPING, AutoModel

    model_class: Any = MODEL_MAPPING.get(type(config), None)
    if not isinstance(model_class, type):
        raise ConfigError(f"{KEY}: transformers has no base model of type {config.model_type}. Use a text encoder.")
    takes_pooler = "add_pooling_layer" in inspect.signature(model_class).parameters
    options = {"add_pooling_layer": with_pooler} if takes_pooler else {}
    if weights_of is None:
        try:
            model = AutoModel.from_config(config, dtype=torch.float32, **options)
        except Exception as error:  # each architecture raises different exceptions
            raise ConfigError(
                f"model.text.architecture cannot be built ({type(error).__name__}: {error}). Compare its values with the encoder's config.json."
            ) from error
    else:
        model = _fetch(weights_of, config, options)
    return model.get_encoder() if config.is_encoder_decoder else model


def _fetch(name: str, config: Any, options: dict[str, Any]) -> Any:
    """Load an encoder with its weights. Only safetensors are read, so that no file of a repository can execute code."""
    from transformers import AutoModel

    try:
        with _no_loading_report():
            model, info = AutoModel.from_pretrained(
                folder_or_hub_name(name),
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                **options,
            )
    except Exception as error:  # the hub client and the file reader raise different exceptions
        raise ConfigError(
            f"{not_loaded(name, error)} Weights are read only from safetensors; model.text.pretrained=false starts from random weights."
        ) from error
    if missing := [*info["missing_keys"], *info.get("mismatched_keys", [])]:
        raise ConfigError(
            f"{KEY}={name}: its weights lack {', '.join(sorted(map(str, missing))[:5])}. Use another model.text.pooler or encoder, or "
            "model.text.pretrained=false."
        )
    return model


@contextmanager
def _no_loading_report() -> Iterator[None]:
    """Silence transformers' report about loaded weights: missing weights are an error here, and unused ones do not matter."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
