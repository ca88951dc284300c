"""Keyword arguments of the Python API as overrides: `optimizer={"lr": 1e-3}` is `optimizer.lr=0.001`, quoted where Hydra's grammar requires it.

A string, or a list of strings, selects options where the key is that of a group (`model="vit_tiny"`), and is the value of a key
otherwise. A mapping sets the keys below. In the mapping of a group, `name` selects an option if there is one of this name, and so
does a key that is the name of an option and has a mapping (`task={"imagenet": {"root": "imagenet"}}`). Other values may be objects
(`config.objects`).
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from numbers import Integral, Real
from types import MappingProxyType
from typing import Any, TypedDict

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from clip_exp.config import objects
from clip_exp.config.base import typed_keys
from clip_exp.config.command_line import in_quotes
from clip_exp.config.compose import compose_config
from clip_exp.config.files import conf_dir, options
from clip_exp.config.model import TOWERS
from clip_exp.config.names import resolve
from clip_exp.config.targets import TARGET
from clip_exp.errors import ConfigError

_KEY = re.compile(r"[\w./@-]+")
# Parameters of `train` for objects, and their keys
PARAMETERS = {"dataset": "data", "val_dataset": "data.val", "transform": "data.transform"}


# Names of options, or a mapping of the keys below
Group = str | list[str] | tuple[str, ...] | Mapping[str, Any] | None
PathLike = str | os.PathLike[str]


class TrainKeywords(TypedDict, total=False):
    """Keywords of `train`: the keys of the configuration, and the groups of recipes."""

    experiment: str | None
    debug: str | None
    model: Any  # also a module, or a pair of modules
    data: Group
    loss: Any  # also a module or function
    optimizer: Group
    scheduler: Group
    strategy: Group
    trainer: Group
    finetune: Group
    callbacks: Group
    logger: Group
    name: str
    seed: int
    output_dir: PathLike
    resume: PathLike
    pretrained: PathLike | None
    pretrained_image: PathLike | None
    pretrained_text: PathLike | None
    pretrained_prefix: str | None
    max_steps: int | None
    epochs: float | None
    global_batch_size: int
    micro_batch_size: int | None
    precision: str
    compile: bool
    max_skipped_steps: int
    log_every_n_steps: int
    val_every_n_steps: int | None
    checkpoint_every_n_steps: int | None
    hang_timeout_s: float | None
    checkpoint_async: bool | str
    keep_checkpoints: int | str
    keep_every_n_steps: int | None
    monitor: str | None
    monitor_mode: str
    patience: int | None
    min_delta: float
    task: Group
    task_every_n_steps: int | None
    allow_targets: list[str]


class EvaluateKeywords(TypedDict, total=False):
    """Keywords of `evaluate`: the keys of the configuration."""

    run: PathLike | None
    ckpt: PathLike | None
    model: Group
    pretrained: PathLike | None
    pretrained_prefix: str | None
    ema: bool
    wise_ft: float | None
    allow_targets: list[str]
    accelerator: str
    precision: str
    batch_size: int
    num_workers: int | None
    on_bad_image: str
    max_image_pixels: int
    task: Group
    name: str | None
    output_dir: PathLike
    devices: int | str | list[int]
    cache_gb: float


def overrides_of(
    command: str, keywords: Mapping[str, Any], typed: Sequence[str], passed: Mapping[str, Any] = MappingProxyType({})
) -> tuple[list[str], dict[str, Any]]:
    """Return the overrides that are equal to keyword arguments, and the objects among them by their full keys.

    A table, or an object, as training data replaces a generated data set unless `data` is selected.

    Args:
        command: name of the command.
        keywords: values by key; a key below a group may be nested (`data={"val": …}`) or written with a dot.
        typed: overrides that precede the keywords.
        passed: objects by key, whatever their type: a list of pairs may be a data set.

    Raises:
        ConfigError: a value cannot be that of a key, a key is not a name, or see `compose_config`.
    """
    found: dict[str, Any] = {}
    written = [override for key, value in keywords.items() for override in _overrides(key, value, found)]
    written += [override for key, value in passed.items() for override in _of_object(key, value, key, found)]
    keys = typed_keys(written)
    option = "custom" if f"data.{TARGET}" in keys else "csv" if "data.train" in keys else None
    if command == "train" and option is not None and "data" not in keys | typed_keys(typed):
        selected = compose_config(command, [*typed, *(each for each in written if not each.startswith("data"))])
        if selected.data.get("generate") is not None:
            written.insert(0, f"data={option}")
    return written, found


def _overrides(key: str, value: Any, found: dict[str, Any]) -> Iterator[str]:
    if not _KEY.fullmatch(key):
        raise ConfigError(f"{key!r} is not a key: keys are names, and dots lead to the keys below (optimizer.lr).")
    if key == "model" and isinstance(value, tuple):
        value = _towers(value)
    group = key.replace(".", "/")
    names = options(group) if (conf_dir() / group).is_dir() else []
    if isinstance(value, Mapping):
        yield from _of_mapping(key, value, group, names, found)
    elif _is_value(value):
        yield f"{group if names and _selects(value) else key}={_text(key, value)}"
    else:
        yield from _of_object(key, value, group, found)


def _of_mapping(
    key: str, values: Mapping[str, Any], group: str, names: list[str], found: dict[str, Any]
) -> Iterator[str]:
    name = values.get("name")
    selects = isinstance(name, str) and (name in names or (key == "model" and resolve(name) is not None))
    chosen = [each for each, inner in values.items() if each in names and isinstance(inner, Mapping)]
    if selects:
        yield f"{group}={_text(key, name)}"
    elif chosen:
        yield f"{group}={chosen[0] if len(chosen) == 1 else '[' + ','.join(chosen) + ']'}"
    elif not values and not names:
        yield f"{key}={{}}"
    for each, value in values.items():
        if each == TARGET and not _is_value(value):
            yield from _of_object(key, value, group, found)
        elif not (selects and each == "name"):
            yield from _overrides(f"{key}.{each}", value, found)


def _of_object(key: str, value: Any, group: str, found: dict[str, Any]) -> Iterator[str]:
    found[key] = value
    if key in ("loss", "model.image", "model.text"):
        yield f"{group}=custom"
    yield f"{key}.{TARGET}={_text(key, objects.name_of(value, key))}"


def _towers(pair: tuple[Any, ...]) -> dict[str, Any]:
    if len(pair) != 2:
        raise ConfigError(f"model has {len(pair)} objects: pass a pair (image module, text module).")
    return dict(zip(TOWERS, pair, strict=True))


def _is_value(value: Any) -> bool:
    return value is None or isinstance(value, str | Real | Enum | os.PathLike | list | tuple) or _has_item(value)


def _has_item(value: Any) -> bool:
    """Return True for a scalar of NumPy that is not a number of Python, such as a boolean."""
    return type(value).__module__ == "numpy" and getattr(value, "shape", None) == ()


def _selects(value: Any) -> bool:
    """Return True for the value of a group: names of options, or null."""
    return value is None or isinstance(value, str) or (isinstance(value, list | tuple) and all(map(_selects, value)))


def _text(key: str, value: Any) -> str:
    """Return a value in Hydra's grammar; parsing it gives an equal value."""
    if isinstance(value, Enum):
        value = value.value
    if _has_item(value):
        value = value.item()
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Integral):
        return repr(int(value))
    if isinstance(value, Real):
        return repr(float(value))
    if isinstance(value, list | tuple):
        return f"[{','.join(_text(key, item) for item in value)}]"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{_name(key, name)}:{_text(key, item)}" for name, item in value.items()) + "}"
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, str):
        return value if _is_plain(value) else in_quotes(value)
    raise ConfigError(f"{key} has a value of type {type(value).__name__}: give a text, a number, a list or a mapping.")


def _name(key: str, name: Any) -> str:
    if (
        isinstance(name, str)
        and re.fullmatch(r"[A-Za-z_][\w-]*", name)
        and name.lower() not in ("null", "true", "false")
    ):
        return name
    raise ConfigError(f"{key}: {name!r} is not a name of a key: use letters, digits and underscores.")


def _is_plain(text: str) -> bool:
    """Return True if a string is itself in Hydra's grammar, also as an element of a list."""
    if not text or text != text.strip() or text.endswith("\\"):
        return False
    parser = OverridesParser.create()
    try:
        alone = parser.parse_override(f"key={text}")
        inside = parser.parse_override(f"key=[{text}]")
        return not alone.is_sweep_override() and alone.value() == text and inside.value() == [text]
    except HydraException:
        return False
