"""`${open_clip:<name>,<field>}` in YAML: a field of a model as one of open_clip's configurations has it.

The files of the installed package are read without importing it: composing takes no torch.
"""

import difflib
from collections.abc import Callable
from typing import Any

from omegaconf import OmegaConf

from clip_exp.errors import ConfigError

Values = dict[str, Any]
CONTEXT_LENGTH = 77  # of open_clip's tokenizers where a configuration has none


def register_open_clip() -> None:
    OmegaConf.register_new_resolver("open_clip", open_clip_field, replace=True)


def open_clip_field(name: str, field: str) -> Any:
    """What `FIELDS` makes of the configuration `name`.

    Raises:
        ConfigError: there is no such configuration.
    """
    return FIELDS[field](open_clip_values(name))


def open_clip_values(name: str | None) -> Values:
    """One of open_clip's configurations, as its file has it: `embed_dim`, `vision_cfg`, `text_cfg`, ….

    Raises:
        ConfigError: there is none of that name.
    """
    from clip_exp.weights.registry import configuration, configurations

    names = configurations()
    if name not in names:
        near = difflib.get_close_matches(str(name), names, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"valid: {', '.join(names)}."
        raise ConfigError(f"model.name={name}: open_clip has no such configuration: {hint}")
    return configuration(str(name))


def can_be_trimmed(text: Values) -> bool:
    """Whether a text tower gives the same features for a batch that is cut to its longest text.

    Hugging Face's encoders mask the padding. A causal transformer sees none of it, unless what it is pooled at comes last: a
    class token behind the text, or simply the last place.
    """
    if text.get("hf_model_name"):
        return True
    pooled_inside = text.get("pool_type", "argmax") in ("argmax", "eos", "first") and not text.get("embed_cls", False)
    return pooled_inside and not text.get("no_causal_mask", False)


def has_text_below(values: Values) -> bool:
    """Whether open_clip's model has its text tower's weights below `text.` (CustomTextCLIP), or below nothing (CLIP)."""
    return values.get("custom_text", False) or "hf_model_name" in values["text_cfg"]


FIELDS: dict[str, Callable[[Values], Any]] = {
    "embed_dim": lambda values: values["embed_dim"],
    "image_size": lambda values: values["vision_cfg"]["image_size"],
    "context_length": lambda values: values["text_cfg"].get("context_length", CONTEXT_LENGTH),
    "vocab_size": lambda values: values["text_cfg"].get("vocab_size", 49408),
    "encoder": lambda values: values["text_cfg"].get("hf_model_name"),
    "tokenizer": lambda values: values["text_cfg"].get("hf_tokenizer_name"),
    "cleaning": lambda values: values["text_cfg"].get("tokenizer_kwargs", {}).get("clean", "whitespace"),
    "strip_sep_token": lambda values: values["text_cfg"].get("tokenizer_kwargs", {}).get("strip_sep_token", False),
    "trim": lambda values: can_be_trimmed(values["text_cfg"]),
}
