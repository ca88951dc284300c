"""Writing of an export: weights, preprocessing, tokenizer and model card. The folder appears only after verification."""

from pathlib import Path
from typing import NamedTuple, Protocol, cast

from clip_exp.config.base import plain
from clip_exp.config.commands import ExportFormat
from clip_exp.config.model import ModelConfig
from clip_exp.config.targets import allowed, targets_of
from clip_exp.errors import ConfigError
from clip_exp.export import huggingface, onnx, open_clip, safetensors
from clip_exp.export.card import write_card
from clip_exp.export.compare import TOLERANCE, TOLERANCE_ONNX, Encoders, require_same
from clip_exp.export.folder import check_target, whole_folder
from clip_exp.export.formats import problems_of
from clip_exp.loading import ModelSource, load_model
from clip_exp.models.clip import CLIP


class Writer(Protocol):
    """Module of a format."""

    def write(self, folder: Path, model: CLIP, config: ModelConfig) -> None:
        """Write weights, preprocessing and tokenizer. The model must be on the CPU in evaluation mode."""
        ...

    def read(self, folder: Path, config: ModelConfig) -> Encoders:
        """Load the towers from the files that `write` has written."""
        ...


WRITERS: dict[ExportFormat, Writer] = {
    ExportFormat.open_clip: cast(Writer, open_clip),
    ExportFormat.huggingface: cast(Writer, huggingface),
    ExportFormat.safetensors: cast(Writer, safetensors),
    ExportFormat.onnx: cast(Writer, onnx),
}


class Written(NamedTuple):
    """Result of an export.

    Attributes:
        folder: output folder.
        size: size of all files in bytes.
        difference: largest difference between normalized features of the model and its export.
    """

    folder: Path
    size: int
    difference: float


def write_export(
    model: CLIP,
    config: ModelConfig,
    source: ModelSource | None,
    output: str | Path,
    chosen: ExportFormat = ExportFormat.open_clip,
    overwrite: bool = False,
) -> Written:
    """Export a model. The output folder appears after its features have been compared with the model's.

    Args:
        model: model to export, on the CPU in evaluation mode.
        config: configuration of the model.
        source: source of the weights, for the model card; None: unknown.
        output: output folder.
        chosen: format of the export.
        overwrite: replace an older export.

    Raises:
        ConfigError: the format does not support the model, or the folder may not be replaced.
        CheckpointError: the folder cannot be written, or the features of the export differ.
    """
    if problems := problems_of(chosen, config):
        raise ConfigError("\n".join(problems))
    target = check_target(output, overwrite)
    writer = WRITERS[chosen]
    tolerance = TOLERANCE_ONNX if chosen is ExportFormat.onnx else TOLERANCE
    with whole_folder(target) as folder:
        writer.write(folder, model, config)
        # The model's code is in this process already, so that reading the export may create its towers again.
        with allowed(name for _, name in targets_of(plain(config))):
            found = require_same(model, writer.read(folder, config), config, tolerance)
        write_card(folder, Path(output).expanduser().absolute().name, chosen, model, config, source)
    return Written(target, sum(path.stat().st_size for path in target.rglob("*") if path.is_file()), found)


def export_source(source: ModelSource, output: str | Path, chosen: ExportFormat, overwrite: bool) -> Written:
    """Load a model and export it; see `write_export`.

    Raises:
        ConfigError, CheckpointError: see `write_export`; or the weights cannot be read.
    """
    return write_export(load_model(source), source.model, source, output, chosen, overwrite)
