"""Export formats and the models that they support. Does not import torch."""

import importlib.util
from collections.abc import Iterator

from clip_exp.config.commands import ExportFormat
from clip_exp.config.model import ModelConfig
from clip_exp.models.families.published import transformers_class

ONNX_NEEDS = ("onnxscript", "onnxruntime")


def problems_of(chosen: ExportFormat, config: ModelConfig) -> list[str]:
    """Return an error message for every reason why a model cannot be exported in a format."""
    if not holds(chosen, config):
        others = [name for name in ExportFormat if holds(name, config)]
        return [
            f"format={chosen} does not support models with an image tower of kind={config.image.kind} and a text tower of "
            f"kind={config.text.kind}. Supported formats: {', '.join(others)}."
        ]
    match chosen:
        case ExportFormat.open_clip:
            return [problem for tower in config.towers for problem in tower.open_clip_problems(config)]
        case ExportFormat.huggingface:
            return list(_huggingface_problems(config))
        case ExportFormat.onnx:
            return list(_onnx_problems())
    return []


def holds(chosen: ExportFormat, config: ModelConfig) -> bool:
    """Return True if a format supports the towers of a model. safetensors and onnx support all towers."""
    match chosen:
        case ExportFormat.open_clip:
            return all(tower.in_open_clip for tower in config.towers)
        case ExportFormat.huggingface:
            return transformers_class(config) is not None
    return True


def _huggingface_problems(config: ModelConfig) -> Iterator[str]:
    family = transformers_class(config)
    if family is not None and family.needs_openai_tokenizer and not config.text.uses_openai_tokenizer:
        yield (
            f"format=huggingface: {family.prefix}Processor supports only OpenAI's tokenizer, but the model has {config.text.tokenizer}. "
            "Use format=open_clip, safetensors or onnx."
        )


def _onnx_problems() -> Iterator[str]:
    missing = [name for name in ONNX_NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        yield f"format=onnx needs {' and '.join(missing)}: pip install 'clip_exp[onnx]', or pip install {' '.join(missing)}."
