"""The Python API: `clip_exp.load`."""

from dataclasses import replace
from pathlib import Path

from clip_exp.config.load import nearest
from clip_exp.config.paths import options
from clip_exp.config.schema import Activation
from clip_exp.errors import ConfigError
from clip_exp.inference.clip import Clip
from clip_exp.inference.loading import choose_device, load_model
from clip_exp.inference.sources import (
    CONFIG,
    Source,
    named_model,
    source_of_checkpoint,
    source_of_file,
    source_of_run,
    source_of_weights,
)

__all__ = ["Clip", "load"]


def load(
    source: str | Path,
    pretrained: str | Path | None = None,
    *,
    accelerator: str = "auto",
    activation: str | None = None,
) -> Clip:
    """A model that is ready to use.

    Args:
        source: with `pretrained`, a model's name (`conf/model/`). Alone, a run folder (its best checkpoint if it has a
            `monitor`, else its last), a checkpoint folder, or a weights file in either or beside its `config.yaml`.
        pretrained: a file of weights, in our format or open_clip's (`.safetensors`, `.pt`, `.bin`).
        accelerator: `auto` (a GPU where there is one), `cpu` or `gpu`.
        activation: `gelu` or `quick_gelu` in place of the model's own; OpenAI's weights need `quick_gelu`.
    Raises:
        ConfigError: no such model, file or folder.
        CheckpointError: the weights cannot be read, or are another model's.
    """
    found = _source(source, pretrained)
    if activation is not None:
        if activation not in list(Activation):
            raise ConfigError(f"activation={activation} must be one of {', '.join(Activation)}.")
        found = replace(found, model=replace(found.model, activation=Activation(activation)))
    device = choose_device(accelerator)
    return Clip(load_model(found, device), found.model, device)


def _source(source: str | Path, pretrained: str | Path | None) -> Source:
    path = Path(source).expanduser()
    if pretrained is not None:
        if path.exists() and str(source) not in options("model"):
            raise ConfigError(
                f"{source} has its own weights: leave out pretrained={pretrained}, or give a model's name."
            )
        return source_of_file(named_model(str(source)), pretrained)
    if path.is_file():
        return source_of_weights(path)
    if (path / CONFIG).is_file():
        return source_of_run(path)
    if path.is_dir():
        return source_of_checkpoint(path)
    if str(source) in options("model"):
        raise ConfigError(
            f'{source} needs weights: load("{source}", pretrained=FILE), with a .safetensors or .pt file.'
        )
    raise ConfigError(
        f"there is no run folder, checkpoint or weights file '{source}', nor a model of that name: "
        f"{nearest(str(source), options('model'))}"
    )
