"""Class names and prompt templates: published lists, or custom ones from the configuration or a file. Does not import torch.

The published lists are in the installed packages `open_clip_torch` (names, templates) and `timm` (wnids, subsets of ImageNet). Their
files are read without importing the packages, which would take seconds.

A custom file is plain text with one text per line (UTF-8, with or without a byte order mark), YAML or JSON. All YAML scalars are
read as text, so the class `no` is not a boolean.
"""

import json
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from clip_exp.data.tables.columns import BLANKS
from clip_exp.errors import ConfigError
from clip_exp.open_clip_files import package_folder, zero_shot_metadata

PLACEHOLDER = "{}"
NAMED_TEMPLATES = {"openai": "OPENAI_IMAGENET_TEMPLATES", "simple": "SIMPLE_IMAGENET_TEMPLATES"}
CLASS_SETS = {"imagenet": "ImageNet-1k", "imagenet_a": "ImageNet-A", "imagenet_r": "ImageNet-R"}


def templates(source: str | list[str], where: str = "templates") -> list[str]:
    """Return prompt templates, each with `{}` for the class name.

    Args:
        source: `openai` (80), `simple` (7), a list, one template, or a file: plain text with one template per line, or a
            list as YAML or JSON.
        where: configuration key, for messages.

    Raises:
        ConfigError: the source is none of these, or a template has no `{}`.
    """
    if isinstance(source, str) and source in NAMED_TEMPLATES:
        return [template(PLACEHOLDER) for template in getattr(zero_shot_metadata(), NAMED_TEMPLATES[source])]
    if isinstance(source, str) and PLACEHOLDER in source:
        source = [source]
    found = read_lines(
        source, where, "openai, simple, a list, or a file of templates (one per line, or a list as YAML or JSON)"
    )
    for template in found:
        if PLACEHOLDER not in template:
            raise ConfigError(
                f"{where}: '{template}' has no {PLACEHOLDER} for the class name, as in 'a photo of a {{}}.'."
            )
    return found


def class_prompts(class_name: str, templates: list[str]) -> list[str]:
    """Return the templates with the class name. `str.format` is not used: names and templates may contain other braces."""
    return [template.replace(PLACEHOLDER, class_name) for template in templates]


@cache
def imagenet_classes() -> list[tuple[str, str]]:
    """Return the 1,000 classes of ImageNet-1k as (wnid, OpenAI's name), in the order of the wnids.

    `missile` and `sunglasses` are the names of two classes each.
    """
    wnids = (package_folder("timm") / "data/_info/imagenet_synsets.txt").read_text(encoding="utf-8").split()
    return list(zip(wnids, zero_shot_metadata().IMAGENET_CLASSNAMES, strict=True))


@cache
def imagenet_index() -> dict[str, int]:
    """Return the position of each wnid among the classes of ImageNet-1k."""
    return {wnid: index for index, (wnid, _) in enumerate(imagenet_classes())}


@dataclass(frozen=True)
class ClassSet:
    """Published classes in the order of their wnids."""

    title: str
    wnids: list[str]
    names: list[str]  # OpenAI's names, which may repeat
    indices: list[int]  # position of each class in ImageNet-1k


@cache
def class_set(name: str) -> ClassSet:
    """Return one of `CLASS_SETS` by name."""
    everything = imagenet_classes()
    indices = list(range(len(everything)))
    if name != "imagenet":
        file = package_folder("timm") / f"data/_info/{name}_indices.txt"
        indices = sorted(int(index) for index in file.read_text(encoding="utf-8").split())
    chosen = [everything[index] for index in indices]
    return ClassSet(CLASS_SETS[name], [wnid for wnid, _ in chosen], [name for _, name in chosen], indices)


class Pairs(list[tuple[Any, Any]]):
    """Entries of a mapping in file order, including repeated keys."""


def read_lines(source: Any, where: str, accepted: str) -> list[str]:
    """Return texts from a list or a file.

    Args:
        source: a list, or a file: plain text with one text per line, or a list as YAML or JSON.
        where: configuration key, for messages.
        accepted: description of the valid values, for messages.

    Raises:
        ConfigError: the source is neither.
    """
    found, where = _found(source, where, accepted)
    if isinstance(found, Pairs):
        raise ConfigError(f"{where} must not be a mapping: use {accepted}.")
    return _texts(found, where, accepted)


def read_names(source: Any, where: str, accepted: str) -> list[str] | dict[str, str]:
    """Return class names as a list, or as a mapping of label to name.

    Args:
        source: a list, a mapping, or a file: plain text with `name` or `label<tab>name` per line, YAML, or JSON.
        where: configuration key, for messages.
        accepted: description of the valid values, for messages.

    Raises:
        ConfigError: the source is none of these, or has a label twice.
    """
    found, where = _found(source, where, accepted)
    if isinstance(found, list) and not isinstance(found, Pairs) and isinstance(source, str):
        tabs = [isinstance(line, str) and "\t" in line.strip() for line in found]
        if any(tabs) and not all(tabs):
            raise ConfigError(
                f"{where}: '{found[tabs.index(False)]}' has no tab between label and name, but other lines have one."
            )
        found = Pairs(tuple(line.strip().split("\t", 1)) for line in found) if any(tabs) else found
    if not isinstance(found, Pairs):
        return _texts(found, where, accepted)
    labels = _texts([label for label, _ in found], where, accepted)
    names = _texts([name for _, name in found], where, accepted)
    if repeated := [label for label, count in Counter(labels).items() if count > 1]:
        raise ConfigError(f"{where} has the label '{repeated[0]}' twice.")
    return dict(zip(labels, names, strict=True))


def _found(source: Any, where: str, accepted: str) -> tuple[Any, str]:
    """Return the contents of the configuration value or of its file, and their location for messages."""
    if isinstance(source, dict):
        return Pairs(source.items()), where
    if not isinstance(source, str):
        return source, where
    path = Path(source).expanduser()
    if not path.is_file():
        raise ConfigError(f"{where}={source}: no such file. Use {accepted}.")
    where = f"{where}={source}"
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{where} is not UTF-8 text ({error.reason} at byte {error.start}): save it as UTF-8."
        ) from error
    except OSError as error:
        raise ConfigError(f"{where} cannot be read: {error.strerror or error}.") from error
    suffix = path.suffix.lower()
    try:
        if suffix == ".json":
            return json.loads(text, object_pairs_hook=Pairs), where
        if suffix in (".yaml", ".yml"):
            node = yaml.compose(text, Loader=yaml.BaseLoader)
            if isinstance(node, yaml.MappingNode):
                return Pairs((_scalar(key), _scalar(value)) for key, value in node.value), where
            return [_scalar(item) for item in node.value] if isinstance(node, yaml.SequenceNode) else None, where
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        kind = "JSON" if suffix == ".json" else "YAML"
        raise ConfigError(f"{where} is not valid {kind}: {' '.join(str(error).split())}.") from error
    return [line for line in text.split("\n") if line.strip()], where


def _scalar(node: yaml.Node) -> str | None:
    return node.value if isinstance(node, yaml.ScalarNode) else None


def _texts(values: Any, where: str, accepted: str) -> list[str]:
    if not isinstance(values, list) or not values:
        raise ConfigError(f"{where} has no texts: use {accepted}.")
    for number, value in enumerate(values, start=1):
        if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip(BLANKS):
            shown = repr(value)
            if value is None or isinstance(value, list | dict):
                shown = "empty" if value is None else "a list" if type(value) is list else "a mapping"
            hint = " Put it in quotes." if isinstance(value, bool | float) else ""
            raise ConfigError(f"{where}: entry {number} is {shown}, not a text.{hint}")
    return [str(value).strip(BLANKS) for value in values]
