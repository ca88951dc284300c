"""`${open_clip:<name>,<field>}` in YAML: a field of a model as one of open_clip's configurations has it.

The files of the installed package are read without importing it: composing takes no torch.
"""

from collections.abc import Callable
from typing import Any

from omegaconf import OmegaConf

from clip_exp.open_clip_files import can_be_trimmed, open_clip_values

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
