"""Tasks on the validation data of the run of a model. Does not import torch."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from clip_exp.config.base import Target
from clip_exp.config.evaluation import TaskConfig
from clip_exp.errors import ConfigError
from clip_exp.evaluation.task import Task
from clip_exp.evaluation.tasks.retrieval import RetrievalTaskConfig
from clip_exp.evaluation.tasks.zero_shot import ZeroShotTaskConfig

if TYPE_CHECKING:
    from clip_exp.config.training import TrainConfig


class AutoTaskConfig(TaskConfig):
    """Tasks on the validation data of the run: retrieval, and zero-shot classification if they have labels."""

    kind: Literal["auto"] = "auto"

    of_validation: ClassVar[bool] = True

    def prepare(self, name: str, output_dir: str, run: "TrainConfig | None" = None) -> list[Task]:
        """Return the task `val_retrieval`, and `val_zero_shot` if the validation data have labels."""
        from clip_exp.data.generated import generate

        if run is None:
            raise ConfigError(
                f"task.{name} needs the validation data of a run, but no run is given: give run=DIR, or another task, such as task=retrieval."
            )
        data = run.data
        if isinstance(data.val, Target):
            raise ConfigError(
                f"task.{name}: the run was validated on the Dataset {data.val.target}, but tasks read tables. Choose another task, such as "
                "task=retrieval task.retrieval.table=pairs.csv."
            )
        table = data.val if data.generate is None else str(generate(data.generate, Path(output_dir)).val)
        if table is None:
            raise ConfigError(
                f"task.{name}: the run has no validation data (data.val). Choose another task, such as task=retrieval."
            )
        common: dict[str, Any] = {
            "table": table,
            "image_root": data.image_root if data.generate is None else None,
            "allow_outside_root": data.allow_outside_root,
            "image_key": data.image_key,
            "separator": data.separator,
            "encoding": data.encoding,
            "on_bad_row": data.on_bad_row,
            "filter": data.filter,
        }
        retrieval = RetrievalTaskConfig(**common, caption_key=data.caption_key)
        found: list[Task] = [*retrieval.prepare("val_retrieval", output_dir)]
        if data.label_key is not None:
            zero_shot = ZeroShotTaskConfig(**common, label_key=data.label_key, templates=data.templates)
            found += zero_shot.prepare("val_zero_shot", output_dir)
        return found
