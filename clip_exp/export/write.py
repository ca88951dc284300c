"""Writing an export: weights and what belongs to them, checked, with a model card, all of it or nothing."""

from pathlib import Path
from typing import NamedTuple, Protocol, cast

from clip_exp.config.commands import ExportFormat
from clip_exp.config.model import ModelConfig
from clip_exp.errors import ConfigError
from clip_exp.export import huggingface, onnx, open_clip, safetensors
from clip_exp.export.card import write_card
from clip_exp.export.compare import TOLERANCE, TOLERANCE_ONNX, Encoders, require_same
from clip_exp.export.folder import check_target, whole_folder
from clip_exp.export.formats import problems_of
from clip_exp.loading import ModelSource, load_model
from clip_exp.models.clip import CLIP


class Writer(Protocol):
    """The module of a format."""

    def write(self, folder: Path, model: CLIP, config: ModelConfig) -> None:
        """Write weights, preprocessing and tokenizer; the model is on the CPU in evaluation mode."""
        ...

    def read(self, folder: Path, config: ModelConfig) -> Encoders:
        """Return the towers, from what `write` wrote."""
        ...


WRITERS: dict[ExportFormat, Writer] = {
    ExportFormat.open_clip: cast(Writer, open_clip),
    ExportFormat.huggingface: cast(Writer, huggingface),
    ExportFormat.safetensors: cast(Writer, safetensors),
    ExportFormat.onnx: cast(Writer, onnx),
}


class Written(NamedTuple):
    folder: Path
    size: int  # bytes
    difference: float  # the largest of a feature of unit norm, between the model and what was read back


def write_export(
    model: CLIP,
    config: ModelConfig,
    source: ModelSource | None,
    output: str | Path,
    chosen: ExportFormat = ExportFormat.open_clip,
    overwrite: bool = False,
) -> Written:
    """Write a model's folder; it appears when all is in it and gives the model's features.

    Args:
        model: on the CPU, in evaluation mode.
        source: where the weights are from, for the card.
        output: the folder.

    Raises:
        ConfigError: the format cannot hold the model, or the folder has something in it.
        CheckpointError: the folder cannot be written, or what was written differs.
    """
    if problems := problems_of(chosen, config):
        raise ConfigError("\n".join(problems))
    target = check_target(output, overwrite)
    writer = WRITERS[chosen]
    tolerance = TOLERANCE_ONNX if chosen is ExportFormat.onnx else TOLERANCE
    with whole_folder(target) as folder:
        writer.write(folder, model, config)
        found = require_same(model, writer.read(folder, config), config, tolerance)
        write_card(folder, Path(output).expanduser().absolute().name, chosen, model, config, source)
    return Written(target, sum(path.stat().st_size for path in target.rglob("*") if path.is_file()), found)


def export_source(source: ModelSource, output: str | Path, chosen: ExportFormat, overwrite: bool) -> Written:
    """Load a model and write its folder; see `write_export`.

    Raises:
        CheckpointError: likewise, or the weights cannot be read.
    """
    return write_export(load_model(source), source.model, source, output, chosen, overwrite)
