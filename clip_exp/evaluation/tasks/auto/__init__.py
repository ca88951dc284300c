"""Tasks on the validation data of the run of a model. Does not import torch."""

from typing import TYPE_CHECKING, Literal

from clip_exp.config.evaluation import TaskConfig
from clip_exp.evaluation.sets.validation import validation_table
from clip_exp.evaluation.task import Task
from clip_exp.evaluation.tasks.retrieval import RetrievalTaskConfig
from clip_exp.evaluation.tasks.zero_shot import ZeroShotTaskConfig

if TYPE_CHECKING:
    from clip_exp.config.training import TrainConfig


class AutoTaskConfig(TaskConfig):
    """Tasks on the validation data of the run: retrieval, and zero-shot classification if they have labels."""

    kind: Literal["auto"] = "auto"

    @property
    def of_validation(self) -> bool:
        return True

    def prepare(self, name: str, output_dir: str, run: "TrainConfig | None" = None) -> list[Task]:
        """Return the task `val_retrieval`, and `val_zero_shot` if the validation data have labels."""
        table = validation_table(run, f"task.{name}", output_dir)
        assert run is not None
        data = run.data
        retrieval = RetrievalTaskConfig(**table, caption_key=data.caption_key)
        found: list[Task] = [*retrieval.prepare("val_retrieval", output_dir)]
        if data.label_key is not None:
            zero_shot = ZeroShotTaskConfig(**table, label_key=data.label_key, templates=data.templates)
            found += zero_shot.prepare("val_zero_shot", output_dir)
        return found
