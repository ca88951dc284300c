"""The models of `conf/model/`, by their names here and elsewhere: FlagAI's, OpenAI's and open_clip's."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from omegaconf import OmegaConf

from clip_exp.config.base import MISSING, parse
from clip_exp.config.files import option_file, options
from clip_exp.config.model import VOCABULARY, ModelConfig
from clip_exp.errors import ConfigError, nearest
from clip_exp.open_clip_files import can_be_trimmed, configurations, open_clip_values

ALIASES = {
    "clip-base-p32-224": "vit_b32",  # FlagAI's
    "clip-base-p16-224": "vit_b16",
    "clip-large-p14-224": "vit_l14",
    "clip-large-p14-336": "vit_l14_336",
    "ViT-B/32": "vit_b32",  # OpenAI's, whose ResNets have the names that they have in open_clip
    "ViT-B/16": "vit_b16",
    "ViT-L/14": "vit_l14",
    "ViT-L/14@336px": "vit_l14_336",
}
QUICK_GELU = "-quickgelu"  # with which open_clip's names end where the nonlinearity is OpenAI's
ADAPTER = "open_clip"  # the option for open_clip's other architectures


@dataclass(frozen=True)
class Named:
    """A model by our words: an option of the group `model`, and keys of it that are set."""

    option: str
    keys: dict[str, str] = field(default_factory=dict)


def resolve(name: str) -> Named | None:
    """What a name means; None where it is no model's."""
    if name in options("model"):
        return Named(name)
    if name in ALIASES:
        return Named(ALIASES[name])
    ours = _by_open_clip_name()
    if name in ours:
        return Named(ours[name])
    base = name.removesuffix(QUICK_GELU)
    if base != name and base in ours:
        return Named(ours[base], {"activation": "quick_gelu"})
    return Named(ADAPTER, {"name": name}) if name in configurations() else None


def names() -> list[str]:
    """Every name of our models, for the nearest one to a typo."""
    return [*options("model"), *ALIASES, *_by_open_clip_name()]


def named_model(name: str) -> ModelConfig:
    """Return the configuration of a model by its name in `conf/model/` or elsewhere.

    Raises:
        ConfigError: there is none of that name.
    """
    named = resolve(name)
    if named is None:
        raise ConfigError(f"there is no model '{name}': {nearest(name, names())}")
    if named == Named(ADAPTER):
        raise ConfigError(f"{name} stands for all architectures of open_clip: name one, such as convnext_base.")
    OmegaConf.register_new_resolver("open_clip", open_clip_field, replace=True)
    values = OmegaConf.load(option_file("model", named.option))
    resolved: Any = OmegaConf.to_container(OmegaConf.merge(values, named.keys), resolve=True)
    return parse(ModelConfig, resolved, "model.")


def known_models() -> Iterator[ModelConfig]:
    """Yield the complete models of `conf/model/`: not the options that take the name of an architecture."""
    for option in options("model", own=False):
        values: Any = OmegaConf.to_container(OmegaConf.load(option_file("model", option)))
        if values["name"] != MISSING:
            yield parse(ModelConfig, values, "model.")


def translate(arguments: list[str]) -> list[str]:
    """Overrides with `model=` of another's name in our words: `model=ViT-B/32` is `model=vit_b32`.

    Raises:
        ConfigError: a sweep over a name that stands for several overrides.
    """
    return [word for argument in arguments for word in _translated(argument)]


def _translated(argument: str) -> list[str]:
    group, _, value = argument.partition("=")
    choices = value.split(",") if group == "model" else []
    # What has no meaning here is the user's own option, or a typo that Hydra answers.
    found = {choice: named for choice in choices if choice not in options("model") and (named := resolve(choice))}
    if not found:
        return [argument]
    if len(choices) == 1:
        return [f"model={found[value].option}", *_overrides(found[value])]
    for choice, named in found.items():
        if named.keys:
            raise ConfigError(
                f"model={choice} stands for model={named.option} {' '.join(_overrides(named))}, which cannot be one choice of "
                "several: give it alone."
            )
    return ["model=" + ",".join(found[choice].option if choice in found else choice for choice in choices)]


def _overrides(named: Named) -> list[str]:
    return [f"model.{key}={value}" for key, value in named.keys.items()]


@cache
def _by_open_clip_name() -> dict[str, str]:
    """open_clip's name of each of our architectures to ours."""
    found = {}
    for option in (option for option in options("model", own=False) if option != ADAPTER):
        values: Any = OmegaConf.load(option_file("model", option))
        name = values.get("open_clip_name")
        if name is not None:
            found[str(name)] = option
    return found


Values = dict[str, Any]
CONTEXT_LENGTH = 77  # of open_clip's tokenizers where a configuration has none


def open_clip_field(name: str, field: str) -> Any:
    """Return what `${open_clip:<name>,<field>}` in YAML stands for: a field of a model as one of open_clip's configurations has it.

    The files of the installed package are read without importing it: composing takes no torch.

    Raises:
        ConfigError: there is no such configuration.
    """
    return FIELDS[field](open_clip_values(name))


FIELDS: dict[str, Callable[[Values], Any]] = {
    "embed_dim": lambda values: values["embed_dim"],
    "image_size": lambda values: values["vision_cfg"]["image_size"],
    "context_length": lambda values: values["text_cfg"].get("context_length", CONTEXT_LENGTH),
    "vocab_size": lambda values: values["text_cfg"].get("vocab_size", VOCABULARY),
    "backbone": lambda values: values["vision_cfg"].get("timm_model_name"),
    "encoder": lambda values: values["text_cfg"].get("hf_model_name"),
    "tokenizer": lambda values: values["text_cfg"].get("hf_tokenizer_name"),
    "cleaning": lambda values: values["text_cfg"].get("tokenizer_kwargs", {}).get("clean", "whitespace"),
    "strip_sep_token": lambda values: values["text_cfg"].get("tokenizer_kwargs", {}).get("strip_sep_token", False),
    "trim": lambda values: can_be_trimmed(values["text_cfg"]),
}
