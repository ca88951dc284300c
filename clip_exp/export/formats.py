"""The formats, and which models each of them can hold. No torch."""

import importlib.util
import json
from collections.abc import Iterator
from typing import Any

from clip_exp import open_clip_files
from clip_exp.config.commands import ExportFormat
from clip_exp.config.model import ImageTower, ModelConfig, Projection, TextTower

ONNX_NEEDS = ("onnxscript", "onnxruntime")
TRANSFORMERS_CLASSES = {(ImageTower.vit, TextTower.clip): "CLIP", (ImageTower.siglip, TextTower.siglip): "Siglip"}


def problems_of(chosen: ExportFormat, config: ModelConfig) -> list[str]:
    """Return why a model cannot be written in a format, a line each."""
    if not holds(chosen, config):
        others = [name for name in ExportFormat if holds(name, config)]
        return [
            f"format={chosen} cannot hold a model with an image tower of kind={config.image.kind} and a text tower of "
            f"kind={config.text.kind}. Formats that can: {', '.join(others)}."
        ]
    match chosen:
        case ExportFormat.open_clip:
            return list(_open_clip_problems(config))
        case ExportFormat.huggingface:
            return list(_huggingface_problems(config))
        case ExportFormat.onnx:
            return list(_onnx_problems())
    return []


def holds(chosen: ExportFormat, config: ModelConfig) -> bool:
    """Return whether a format has a place for these two towers: safetensors and onnx know no towers."""
    match chosen:
        case ExportFormat.open_clip:  # its configurations take a Hugging Face encoder from the hub alone
            return config.text.kind is not TextTower.huggingface
        case ExportFormat.huggingface:
            return (config.image.kind, config.text.kind) in TRANSFORMERS_CLASSES
    return True


def transformers_class(config: ModelConfig) -> str:
    """Return what the names of transformers' classes for these towers begin with."""
    return TRANSFORMERS_CLASSES[config.image.kind, config.text.kind]


def published(config: ModelConfig) -> dict[str, Any]:
    """Return open_clip's own configuration of the architecture; empty where it has none."""
    name = config.open_clip_name
    return (
        json.loads(json.dumps(open_clip_files.configuration(name))) if name in open_clip_files.configurations() else {}
    )


def _open_clip_problems(config: ModelConfig) -> Iterator[str]:
    if config.image.kind is ImageTower.timm and config.image.projection is Projection.none:
        yield "format=open_clip has no timm backbone without a projection: use format=safetensors or onnx."
    if config.image.kind is ImageTower.siglip and not published(config):
        yield (
            "format=open_clip names SigLIP's image tower by its backbone in timm: set model.open_clip_name to open_clip's "
            "name of an architecture with the same numbers, such as ViT-B-16-SigLIP, or use format=huggingface, "
            "safetensors or onnx."
        )


def _huggingface_problems(config: ModelConfig) -> Iterator[str]:
    if transformers_class(config) == "CLIP" and not config.text.uses_openai_tokenizer:
        yield (
            f"format=huggingface: CLIPProcessor reads OpenAI's tokenizer, and this model has {config.text.tokenizer}. "
            "Use format=open_clip, safetensors or onnx."
        )


def _onnx_problems() -> Iterator[str]:
    missing = [name for name in ONNX_NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        yield f"format=onnx needs {' and '.join(missing)}: pip install 'clip_exp[onnx]', or pip install {' '.join(missing)}."
