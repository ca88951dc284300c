"""open_clip's registry of pretrained weights and its configurations, read from the installed package without importing it.

Importing `open_clip`, or the module of the registry alone, takes seconds and torch; what is wanted of it is plain dictionaries.
"""

import __future__

import ast
import copy
import json
from dataclasses import dataclass
from functools import cache
from pathlib import PurePosixPath
from typing import Any

from clip_exp.config.model_schema import Interpolation, ResizeMode
from clip_exp.config.paths import package_folder


@dataclass(frozen=True)
class Entry:
    """Published weights of one of open_clip's architectures, and how they were trained."""

    model: str  # open_clip's name of the architecture
    tag: str
    url: str | None
    hub: str | None  # org/name on the Hugging Face hub
    hub_file: str | None  # in that repository; None: where open_clip puts its weights
    sha256: str | None  # of what is at `url`, or its first 8 digits
    quick_gelu: bool
    mean: list[float]
    std: list[float]
    interpolation: Interpolation
    resize_mode: ResizeMode


def clean(tag: str) -> str:
    """A tag as the registry spells it: open_clip takes `laion2b-s34b-b79k` and capitals too."""
    return tag.lower().replace("-", "_")


def tags(open_clip_name: str | None) -> list[str]:
    """The tags of an architecture in the registry's order; none for a name that it does not have."""
    return list(_registry().get(open_clip_name or "", {}))


def entry(open_clip_name: str | None, tag: str) -> Entry | None:
    """What the registry says about a tag; None where the architecture has no such tag."""
    values = _registry().get(open_clip_name or "", {}).get(clean(tag))
    if values is None:
        return None
    repository, _, file = values["hf_hub"].rpartition("/")
    return Entry(
        model=str(open_clip_name),
        tag=clean(tag),
        url=values["url"] or None,
        hub=repository or None,
        hub_file=file or None,
        sha256=_sha256_in(values["url"]),
        quick_gelu=values.get("quick_gelu", False),
        mean=list(values["mean"]),
        std=list(values["std"]),
        interpolation=Interpolation(values["interpolation"]),
        resize_mode=ResizeMode(values["resize_mode"]),
    )


@cache
def configurations() -> list[str]:
    """The names of open_clip's configurations, sorted."""
    return sorted(path.stem for path in (package_folder("open_clip") / "model_configs").glob("*.json"))


@cache
def configuration(open_clip_name: str) -> dict[str, Any]:
    """One of open_clip's configurations, as its file has it."""
    path = package_folder("open_clip") / "model_configs" / f"{open_clip_name}.json"
    return json.loads(path.read_text(encoding="utf-8"))


def _sha256_in(url: str) -> str | None:
    """OpenAI's addresses have the hash as a folder, open_clip's releases its first 8 digits at the end of the file's name."""
    path = PurePosixPath(url)
    if "openaipublic" in url:
        return path.parent.name
    return path.stem.rpartition("-")[2] if "mlfoundations" in url else None


@cache
def _registry() -> dict[str, dict[str, dict[str, Any]]]:
    """Architecture -> tag -> values: the module's statements but for its imports, of which only the constants matter."""
    folder = package_folder("open_clip")
    values: dict[str, Any] = {"copy": copy}
    exec(compile((folder / "constants.py").read_text(encoding="utf-8"), "constants.py", "exec"), values)
    module = ast.parse((folder / "pretrained.py").read_text(encoding="utf-8"))
    module.body = [node for node in module.body if not isinstance(node, ast.Import | ast.ImportFrom | ast.Try)]
    unevaluated = __future__.annotations.compiler_flag  # annotations name what was not imported
    exec(compile(module, "pretrained.py", "exec", unevaluated, dont_inherit=True), values)
    return values["_PRETRAINED"]
