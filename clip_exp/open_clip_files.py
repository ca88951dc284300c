"""Files that open_clip ships (configurations, registry, class names, vocabulary), read without importing it; and where packages lie.

Importing `open_clip`, or the module of its registry alone, takes seconds and torch; all that is needed are plain values.
"""

import __future__

import ast
import copy
import difflib
import importlib.util
import json
from dataclasses import dataclass
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any

from clip_exp.errors import ConfigError

VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"


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
    interpolation: str  # bicubic or bilinear
    resize_mode: str  # shortest or squash


def package_folder(package: str) -> Path:
    """Return the folder of an installed package without importing it.

    Raises:
        ConfigError: it is not installed.
    """
    spec = PathFinder.find_spec(package)
    if spec is None or spec.origin is None:
        distribution = {"open_clip": "open_clip_torch"}.get(package, package)
        raise ConfigError(f"{distribution} is not installed beside clip_exp; run: pip install {distribution}")
    return Path(spec.origin).parent


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
        interpolation=values["interpolation"],
        resize_mode=values["resize_mode"],
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


def open_clip_values(name: str | None) -> dict[str, Any]:
    """Return one of open_clip's configurations as its file has it: `embed_dim`, `vision_cfg`, `text_cfg`, ….

    Raises:
        ConfigError: there is none of that name.
    """
    names = configurations()
    if name not in names:
        near = difflib.get_close_matches(str(name), names, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"valid names are {', '.join(names)}."
        raise ConfigError(f"model.name={name}: open_clip has no such configuration: {hint}")
    return configuration(str(name))


def published(name: str | None) -> dict[str, Any]:
    """Return one of open_clip's configurations, to be changed; empty where there is none of that name."""
    return copy.deepcopy(configuration(name)) if name in configurations() else {}


def can_be_trimmed(text: dict[str, Any]) -> bool:
    """Return whether a text tower gives the same features for a batch that is cut to its longest text.

    Hugging Face's encoders mask the padding. A causal transformer sees none of it, unless what it is pooled at comes last: a
    class token behind the text, or simply the last place.

    Args:
        text: `text_cfg` of a configuration.
    """
    if text.get("hf_model_name"):
        return True
    pooled_inside = text.get("pool_type", "argmax") in ("argmax", "eos", "first") and not text.get("embed_cls", False)
    return pooled_inside and not text.get("no_causal_mask", False)


def has_text_below(values: dict[str, Any]) -> bool:
    """Return whether open_clip's model has its text tower's weights under `text.` (CustomTextCLIP) or at the top (CLIP)."""
    return values.get("custom_text", False) or "hf_model_name" in values["text_cfg"]


@cache
def zero_shot_metadata() -> ModuleType:
    """Return OpenAI's ImageNet class names and prompt templates: the constants of `open_clip.zero_shot_metadata`."""
    path = package_folder("open_clip") / "zero_shot_metadata.py"
    spec = importlib.util.spec_from_file_location("clip_exp._open_clip_zero_shot_metadata", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def vocabulary_file() -> Path:
    """Return the file of merges of OpenAI's byte-pair encoding.

    Raises:
        ConfigError: the package or the file is missing.
    """
    path = package_folder("open_clip") / VOCABULARY
    if not path.is_file():
        raise ConfigError(
            f"The tokenizer's vocabulary {VOCABULARY} was not found: it comes with the package open_clip_torch. "
            "Install it: pip install 'open_clip_torch>=3.3,<4'."
        )
    return path


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
