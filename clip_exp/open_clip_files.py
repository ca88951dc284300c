"""Reading of files in the package open_clip (model configurations, registry, class names, vocabulary) without importing it.

Importing `open_clip`, or only the module of its registry, imports torch and takes seconds, but only plain values are
needed.
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
    """Published weights of one of open_clip's architectures, and their preprocessing.

    Attributes:
        model: open_clip's name of the architecture.
        tag: open_clip's tag of the weights.
        url: URL of the weights, if any.
        hub: repository on the Hugging Face hub, org/name, if any.
        hub_file: file in the repository; None: open_clip's default file name.
        sha256: SHA-256 of the file at `url`, or its first 8 digits.
        quick_gelu: whether the weights were trained with QuickGELU.
        mean: mean of the RGB channels for pixels in 0..1.
        std: standard deviation of the RGB channels.
        interpolation: bicubic or bilinear.
        resize_mode: shortest or squash.
    """

    model: str
    tag: str
    url: str | None
    hub: str | None
    hub_file: str | None
    sha256: str | None
    quick_gelu: bool
    mean: list[float]
    std: list[float]
    interpolation: str
    resize_mode: str


def package_folder(package: str) -> Path:
    """Return the folder of an installed package without importing it.

    Raises:
        ConfigError: the package is not installed.
    """
    spec = PathFinder.find_spec(package)
    if spec is None or spec.origin is None:
        distribution = {"open_clip": "open_clip_torch"}.get(package, package)
        raise ConfigError(f"the package {distribution} is not installed: pip install {distribution}")
    return Path(spec.origin).parent


def clean(tag: str) -> str:
    """Return a tag in the registry's spelling. Like open_clip, it accepts hyphens and capitals: `laion2b-s34b-b79k`."""
    return tag.lower().replace("-", "_")


def tags(open_clip_name: str | None) -> list[str]:
    """Return the tags of an architecture in the registry's order; empty for an unknown architecture."""
    return list(_registry().get(open_clip_name or "", {}))


def entry(open_clip_name: str | None, tag: str) -> Entry | None:
    """Return the registry's entry for a tag; None if the architecture has no such tag."""
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
    """Return the sorted names of open_clip's model configurations."""
    return sorted(path.stem for path in (package_folder("open_clip") / "model_configs").glob("*.json"))


@cache
def configuration(open_clip_name: str) -> dict[str, Any]:
    """Read the file of one of open_clip's model configurations."""
    path = package_folder("open_clip") / "model_configs" / f"{open_clip_name}.json"
    return json.loads(path.read_text(encoding="utf-8"))


def open_clip_values(name: str | None) -> dict[str, Any]:
    """Return one of open_clip's model configurations: `embed_dim`, `vision_cfg`, `text_cfg`, ….

    Raises:
        ConfigError: the name is unknown.
    """
    names = configurations()
    if name not in names:
        near = difflib.get_close_matches(str(name), names, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"valid names are {', '.join(names)}."
        raise ConfigError(f"model.name={name} is not a model of open_clip: {hint}")
    return configuration(str(name))


def published(name: str | None) -> dict[str, Any]:
    """Return a copy of one of open_clip's model configurations; empty if the name is unknown."""
    return copy.deepcopy(configuration(name)) if name in configurations() else {}


def can_be_trimmed(text: dict[str, Any]) -> bool:
    """Return True if a text tower gives the same features for a batch that is truncated to its longest text.

    Hugging Face's encoders mask the padding. In a causal transformer, tokens do not attend to padding after them, so
    features change only if they are pooled after the padding: at a class token behind the text, or at the last
    position.

    Args:
        text: `text_cfg` of a configuration.
    """
    if text.get("hf_model_name"):
        return True
    pooled_inside = text.get("pool_type", "argmax") in ("argmax", "eos", "first") and not text.get("embed_cls", False)
    return pooled_inside and not text.get("no_causal_mask", False)


def has_text_below(values: dict[str, Any]) -> bool:
    """Return True if open_clip's model has its text tower under `text.` (CustomTextCLIP); False if at the top level (CLIP)."""
    return values.get("custom_text", False) or "hf_model_name" in values["text_cfg"]


@cache
def zero_shot_metadata() -> ModuleType:
    """Return the module `open_clip.zero_shot_metadata`, with OpenAI's ImageNet class names and prompt templates."""
    path = package_folder("open_clip") / "zero_shot_metadata.py"
    spec = importlib.util.spec_from_file_location("clip_exp._open_clip_zero_shot_metadata", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def vocabulary_file() -> Path:
    """Return the path of the merges file of OpenAI's byte-pair encoding.

    Raises:
        ConfigError: the package or the file is missing.
    """
    path = package_folder("open_clip") / VOCABULARY
    if not path.is_file():
        raise ConfigError(
            f"{path} not found: the tokenizer's vocabulary is part of the package open_clip_torch. Install it: "
            "pip install 'open_clip_torch>=3.3,<4'."
        )
    return path


def _sha256_in(url: str) -> str | None:
    """Return the hash in a URL: OpenAI's URLs have it as a folder, open_clip's its first 8 digits at the end of the file name."""
    path = PurePosixPath(url)
    if "openaipublic" in url:
        return path.parent.name
    return path.stem.rpartition("-")[2] if "mlfoundations" in url else None


@cache
def _registry() -> dict[str, dict[str, dict[str, Any]]]:
    """Return open_clip's registry as architecture -> tag -> values, by executing its module without the imports."""
    folder = package_folder("open_clip")
    values: dict[str, Any] = {"copy": copy}
    exec(compile((folder / "constants.py").read_text(encoding="utf-8"), "constants.py", "exec"), values)
    module = ast.parse((folder / "pretrained.py").read_text(encoding="utf-8"))
    module.body = [node for node in module.body if not isinstance(node, ast.Import | ast.ImportFrom | ast.Try)]
    # Annotations must not be evaluated, since they use names that were not imported.
    unevaluated = __future__.annotations.compiler_flag
    exec(compile(module, "pretrained.py", "exec", unevaluated, dont_inherit=True), values)
    return values["_PRETRAINED"]
