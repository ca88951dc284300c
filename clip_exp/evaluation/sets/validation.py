"""Validation data of a run, as the table of a task. Does not import torch."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from clip_exp.config.base import Target
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
    table = data.val if data.generate is None else str(generate(data.generate, Path(output_dir)).val)
    if table is None:
        raise ConfigError(f"{key}: the run has no validation data (data.val): {ANOTHER}")
    return {
        "table": table,
        "image_root": data.image_root if data.generate is None else None,
        "allow_outside_root": data.allow_outside_root,
        "image_key": data.image_key,
        "separator": data.separator,
        "encoding": data.encoding,
        "on_bad_row": data.on_bad_row,
        "filter": data.filter,
    }
