"""A task whose files are found and whose names are matched, ready for a model: what `TaskConfig.prepare` returns. No torch."""

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
    """A task that is ready to be scored."""

    name: str
    config: TaskConfig

    @property
    def num_classes(self) -> int | None:
        """Number of classes of a classification; None of other tasks."""
        return None

    @property
    def metrics(self) -> list[str]:
        """Names of what scoring yields, one of which a training run may watch (`monitor`)."""
        from clip_exp.reports.names import of_classification

        return [] if self.num_classes is None else of_classification(self.num_classes)

    def warnings(self) -> Iterator[str]:
        """Yield what makes results doubtful, and is known before a run is trained."""
        yield from ()

    def score(self, model: "EvaluatedModel") -> "ComputeResult":
        """Encode what is needed; return what remains, which makes the result (`reports.evaluation.Result`).

        Every rank calls, and encodes its shard of the images and texts (`EvaluatedModel.encode_images`, `EvaluatedModel.encode_texts`); rank 0 alone
        calls what is returned.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class LearnedTask(Task):
    """A classification that is learned from labeled images."""

    train: "LabeledImages"
    test: "LabeledImages"  # of the same classes
    overlap: "Overlap | None"  # of `test` with `train`; None: they cannot be compared

    @property
    def num_classes(self) -> int | None:
        return len(self.test.class_names)

    @property
    def labeled(self) -> LabeledDataConfig:
        """The configuration of `test`."""
        assert isinstance(self.config, LabeledDataConfig)
        return self.config

    def warnings(self) -> Iterator[str]:
        from clip_exp.reports.evaluation import overlap_warning

        protocol = {} if self.overlap is None else {"overlap": self.overlap.protocol()}
        if (warning := overlap_warning(self.name, protocol)) is not None:
            yield warning
