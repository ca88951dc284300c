"""The formats, and which models each of them can hold. No torch."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from clip_exp.config.model_schema import ModelConfig
from clip_exp.config.use_schema import ExportFormat
from clip_exp.export import huggingface, onnx, open_clip, safetensors

if TYPE_CHECKING:
    from clip_exp.export.compare import Encoders
    from clip_exp.models.clip import CLIP


class Writer(Protocol):
    """What the module of a format has."""

    def holds(self, config: ModelConfig) -> bool:
        """Whether the format has a place for these towers."""
        ...

    def problems_of(self, config: ModelConfig) -> Iterator[str]:
        """What else keeps a model from the format, a line each."""
        ...

    def write(self, folder: Path, model: "CLIP", config: ModelConfig) -> None:
        """Write weights, preprocessing and tokenizer; the model is on the CPU in evaluation mode."""
        ...

    def read(self, folder: Path, config: ModelConfig) -> "Encoders":
        """The towers, from what `write` wrote."""
        ...


FORMATS: dict[ExportFormat, Writer] = {
    ExportFormat.open_clip: cast(Writer, open_clip),
    ExportFormat.huggingface: cast(Writer, huggingface),
    ExportFormat.safetensors: cast(Writer, safetensors),
    ExportFormat.onnx: cast(Writer, onnx),
}


def problems_of(chosen: ExportFormat, config: ModelConfig) -> list[str]:
    """Why a model cannot leave in a format, a line each."""
    if not FORMATS[chosen].holds(config):
        others = [name for name, writer in FORMATS.items() if writer.holds(config)]
        return [
            f"format={chosen} cannot hold a model with an image tower of kind={config.image.kind} and a text tower of "
            f"kind={config.text.kind}. Formats that can: {', '.join(others)}."
        ]
    return list(FORMATS[chosen].problems_of(config))
