"""k-nearest-neighbor classification: its configuration and data. Does not import torch before it scores a model."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from clip_exp.config.base import Count, Positive
from clip_exp.config.evaluation import LabeledDataConfig, TaskConfig
from clip_exp.errors import ConfigError
from clip_exp.evaluation.task import LearnedTask

if TYPE_CHECKING:
    from clip_exp.evaluation.evaluated_model import ComputeResult, EvaluatedModel


class KNNTaskConfig(LabeledDataConfig, TaskConfig):
    """Vote of the k nearest training images by cosine similarity."""

    kind: Literal["knn"] = "knn"
    train: LabeledDataConfig = Field(default_factory=LabeledDataConfig)
    k: Count = Field(20, description="neighbors that vote")
    temperature: Positive = Field(0.07, description="a neighbor's vote weighs exp(cosine / temperature)")

    title: ClassVar[str] = "Nearest neighbors"

    def prepare(self, name: str, output_dir: str, run: Any = None) -> "list[KNNTask]":
        """Find the training and test images and match their classes."""
        from clip_exp.evaluation.sets.splits import prepare_train_and_test

        train, test, overlap = prepare_train_and_test(name, self, self.train, output_dir)
        if self.k > len(train.labels):
            raise ConfigError(
                f"task.{name}.k={self.k} must be between 1 and {len(train.labels)}, the number of training images."
            )
        return [KNNTask(name, self, train, test, overlap)]


@dataclass(frozen=True)
class KNNTask(LearnedTask):
    config: KNNTaskConfig

    def score(self, model: "EvaluatedModel") -> "ComputeResult":
        from clip_exp.evaluation.tasks.knn.score import score_knn  # imports torch

        return score_knn(self, model)
