"""Zero-shot classification: its configuration, and how its images, names and templates are found. No torch."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from clip_exp.config.base import Texts
from clip_exp.config.evaluation import LabeledDataConfig, TaskConfig
from clip_exp.evaluation.task import Task

if TYPE_CHECKING:
    from clip_exp.evaluation.sets.labeled import LabeledImages
    from clip_exp.evaluation.subject import Judge, Subject


class ZeroShotTaskConfig(LabeledDataConfig, TaskConfig):
    """Zero-shot classification: each class is the average of its name in every template."""

    kind: Literal["zero_shot"] = "zero_shot"
    templates: Texts = Field(
        "openai", description="openai (80), simple (7), a list, or a file with one template per line"
    )

    title: ClassVar[str] = "Zero-shot classification"

    def prepare(self, name: str, output_dir: str, run: Any = None) -> "list[ClassificationTask]":
        """Find the pictures, labels, names and templates."""
        from clip_exp.evaluation.sets.class_names import templates
        from clip_exp.evaluation.sets.datasets import labeled_images

        where = f"task.{name}"
        prompts = templates(self.templates, f"{where}.templates")
        return [ClassificationTask(name, self, labeled_images(self, where, output_dir), prompts)]


@dataclass(frozen=True)
class ClassificationTask(Task):
    config: ZeroShotTaskConfig
    images: "LabeledImages"
    templates: list[str]

    @property
    def num_classes(self) -> int | None:
        return len(self.images.class_names)

    def score(self, subject: "Subject") -> "Judge":
        from clip_exp.evaluation.tasks.zero_shot.score import score_classification  # imports torch

        return score_classification(self, subject)
