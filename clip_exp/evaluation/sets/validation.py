"""Validation data of a run, as the table of a task. Does not import torch."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from clip_exp.config.base import Target
from clip_exp.config.data import Source
from clip_exp.data.generated import generate
from clip_exp.errors import ConfigError

if TYPE_CHECKING:
    from clip_exp.config.training import TrainConfig

ANOTHER = "set task=retrieval task.retrieval.table=pairs.csv, or choose another task."


def validation_table(run: "TrainConfig | None", key: str, output_dir: str) -> dict[str, Any]:
    """Return the table of the validation data of a run, and how it is read, as values of `TableConfig`.

    Args:
        run: configuration of the run; None: the model is not from a run.
        key: key of the task, such as `task.auto`, for messages.
        output_dir: folder for generated data.

    Raises:
        ConfigError: there is no run, or it has no table of validation data.
    """
    if run is None:
        raise ConfigError(f"{key} needs the validation data of a run, but no run is given: give run=DIR, or {ANOTHER}")
    data = run.data
    if isinstance(data.val, Target):
        raise ConfigError(
            f"{key}: the run was validated on the Dataset {data.val.target}, but tasks read tables: {ANOTHER}"
        )
    sources = data.sources if data.val_fraction is not None else data.val_sources
    if data.generate is not None:
        sources = [Source(path=str(generate(data.generate, Path(output_dir)).val))]
    if not sources:
        raise ConfigError(f"{key}: the run has no validation data (data.val): {ANOTHER}")
    if len(sources) > 1:
        raise ConfigError(
            f"{key}: the run has {len(sources)} sources of validation data, but a task reads one table: {ANOTHER}"
        )
    read = data.model_copy(update=sources[0].reading)
    return {
        "table": read_path(sources[0]),
        "image_root": read.image_root if data.generate is None else None,
        "allow_outside_root": data.allow_outside_root,
        "on_bad_row": data.on_bad_row,
        "table_format": read.format,
        "held_out_fraction": data.val_fraction,
        "held_out_seed": data.val_seed,
        **{key: getattr(read, key) for key in _READING},
    }


_READING = (
    "image_key", "caption_list", "caption_lines", "header", "separator", "encoding", "filter",
)  # fmt: skip


def read_path(source: Source) -> str | list[str]:
    """Return the only file or pattern of a source, or the list of them."""
    return source.paths[0] if len(source.paths) == 1 else source.paths
