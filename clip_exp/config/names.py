"""Names of models: the options of `conf/model/`, and the names of the same models in FlagAI, OpenAI's repository and open_clip."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from omegaconf import OmegaConf

from clip_exp.config.base import MISSING, parse
from clip_exp.config.files import option_file, options
from clip_exp.config.model import VOCABULARY, ModelConfig
from clip_exp.config.words import fold
from clip_exp.errors import ConfigError, nearest
from clip_exp.open_clip_files import can_be_trimmed, configurations, open_clip_values

ALIASES = {
    # FlagAI's names
    "clip-base-p32-224": "vit_b32",
    "clip-base-p16-224": "vit_b16",
    "clip-large-p14-224": "vit_l14",
    "clip-large-p14-336": "vit_l14_336",
    # OpenAI's names; those of its ResNets are the same as open_clip's
    "ViT-B/32": "vit_b32",
    "ViT-B/16": "vit_b16",
    "ViT-L/14": "vit_l14",
    "ViT-L/14@336px": "vit_l14_336",
}
# Suffix of open_clip's names of models with OpenAI's activation
QUICK_GELU = "-quickgelu"
# Option for the architectures of open_clip that have no option here
ADAPTER = "open_clip"


@dataclass(frozen=True)
class Named:
    """Option of the group `model`, and keys of the model to set."""

    option: str
    keys: dict[str, str] = field(default_factory=dict)


def resolve(name: str) -> Named | None:
    """Return the option and keys that a name stands for, regardless of case, `-` and `_`; None if the name is unknown.

    Raises:
        ConfigError: the name stands for several models.
    """
    if (exact := _resolve(name)) is not None:
        return exact
    alike = [each for each in [*names(), *configurations()] if fold(each) == fold(name)]
    found = {str(named): named for each in alike if (named := _resolve(each))}
    if len(found) > 1:
        raise ConfigError(f"model={name} is ambiguous: type {' or '.join(alike)}.")
    return next(iter(found.values()), None)


def option_like(group: str, name: str, valid: Collection[str]) -> str:
    """Return the option with a name, or the only one whose name differs only in case, `-` and `_`; else the name itself.

    Raises:
        ConfigError: several options differ only in case, `-` and `_`.
    """
    alike = [name] if name in valid else sorted(each for each in valid if fold(each) == fold(name))
    if len(alike) > 1:
        raise ConfigError(f"{group}={name} is ambiguous: type {' or '.join(f'{group}={each}' for each in alike)}.")
    return alike[0] if alike else name


def _resolve(name: str) -> Named | None:
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
    """Return all names of models, to suggest the nearest one after a typo."""
    return [*options("model"), *ALIASES, *_by_open_clip_name()]


def named_model(name: str) -> ModelConfig:
    """Return the configuration of a model by its name in `conf/model/` or in another library.

    Raises:
        ConfigError: the name is unknown.
    """
    named = resolve(name)
    if named is None:
        raise ConfigError(f"unknown model '{name}': {nearest(name, names())}")
    if named == Named(ADAPTER):
        raise ConfigError(
            f"{name} stands for any architecture of open_clip: give the name of one, such as convnext_base."
        )
    OmegaConf.register_new_resolver("open_clip", open_clip_field, replace=True)
    values = OmegaConf.load(option_file("model", named.option))
    resolved: Any = OmegaConf.to_container(OmegaConf.merge(values, named.keys), resolve=True)
    return parse(ModelConfig, resolved, "model.")


def known_models() -> Iterator[ModelConfig]:
    """Yield the complete models of `conf/model/`, without options that need the name of an architecture."""
    for option in options("model", custom=False):
        values: Any = OmegaConf.to_container(OmegaConf.load(option_file("model", option)))
        if values["name"] != MISSING:
            yield parse(ModelConfig, values, "model.")


def translate(arguments: list[str]) -> list[str]:
    """Replace other libraries' names of models in overrides by ours: `model=ViT-B/32` becomes `model=vit_b32`.

    Raises:
        ConfigError: a sweep has a name that stands for several overrides.
    """
    return [word for argument in arguments for word in _translated(argument)]


def _translated(argument: str) -> list[str]:
    group, _, value = argument.partition("=")
    choices = value.split(",") if group == "model" else []
    # Other names are custom options, or typos that Hydra reports.
    found = {choice: named for choice in choices if choice not in options("model") and (named := resolve(choice))}
    if not found:
        return [argument]
    if len(choices) == 1:
        return [f"model={found[value].option}", *_overrides(found[value])]
    for choice, named in found.items():
        if named.keys:
            raise ConfigError(
                f"model={choice} stands for model={named.option} {' '.join(_overrides(named))}, which cannot be combined with other "
                "models in a sweep: run it separately."
            )
    return ["model=" + ",".join(found[choice].option if choice in found else choice for choice in choices)]


def _overrides(named: Named) -> list[str]:
    return [f"model.{key}={value}" for key, value in named.keys.items()]


@cache
def _by_open_clip_name() -> dict[str, str]:
    """Return a mapping from open_clip's names to the names of our options."""
    found = {}
    for option in (option for option in options("model", custom=False) if option != ADAPTER):
        values: Any = OmegaConf.load(option_file("model", option))
        name = values.get("open_clip_name")
        if name is not None:
            found[str(name)] = option
    return found


Values = dict[str, Any]
# Context length of open_clip's tokenizers if a configuration does not set it
CONTEXT_LENGTH = 77


def open_clip_field(name: str, field: str) -> Any:
    """Resolve `${open_clip:<name>,<field>}` in YAML: a field of one of open_clip's model configurations.

    The files of the installed package are read without importing it, so that composing a configuration does not import
    torch.

    Args:
        name: name of the model in open_clip.
        field: key of `FIELDS`.

    Raises:
        ConfigError: the model is unknown to open_clip.
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
