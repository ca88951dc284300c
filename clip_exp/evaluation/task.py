"""Prepared evaluation tasks, with files found and names matched: the output of `TaskConfig.prepare`. Does not import torch."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from clip_exp.config.evaluation import LabeledDataConfig, TaskConfig

if TYPE_CHECKING:
    from clip_exp.evaluation.evaluated_model import ComputeResult, EvaluatedModel
    from clip_exp.evaluation.sets.labeled import LabeledImages
    from clip_exp.evaluation.sets.splits import Overlap


@dataclass(frozen=True)
class Task:
    """Evaluation task that is ready to be scored."""

    name: str
    config: TaskConfig

    @property
    def num_classes(self) -> int | None:
        """Number of classes of a classification; None for other tasks."""
        return None

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics of the task; a training run may use one as its `monitor`."""
        from clip_exp.reports.names import of_classification

        return [] if self.num_classes is None else of_classification(self.num_classes)

    def warnings(self) -> Iterator[str]:
        """Yield warnings about the data that are known before training."""
        yield from ()

    def score(self, model: "EvaluatedModel") -> "ComputeResult":
        """Encode the data; return a function that computes the result (`reports.evaluation.Result`).

        All ranks call this method and encode a part of the images and texts each (`EvaluatedModel.encode_images`,
        `EvaluatedModel.encode_texts`). Only rank 0 calls the returned function.

        Args:
            model: model to score.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class LearnedTask(Task):
    """Classification that is learned from labeled images."""

    train: "LabeledImages"
    test: "LabeledImages"  # with the same classes as `train`
    overlap: "Overlap | None"  # images of `test` that are also in `train`; None: they cannot be compared

    @property
    def num_classes(self) -> int | None:
        return len(self.test.class_names)

    @property
    def labeled(self) -> LabeledDataConfig:
        """Configuration of `test`."""
        assert isinstance(self.config, LabeledDataConfig)
        return self.config

    def warnings(self) -> Iterator[str]:
        from clip_exp.reports.evaluation import overlap_warning

        protocol = {} if self.overlap is None else {"overlap": self.overlap.protocol()}
        if (warning := overlap_warning(self.name, protocol)) is not None:
            yield warning
