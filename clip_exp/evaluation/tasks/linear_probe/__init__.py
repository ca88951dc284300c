"""Linear probe: its configuration and data. Does not import torch before it scores a model."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from clip_exp.config.base import NOT_EMPTY, Count, Index, Positive, Proportion, Unused
from clip_exp.config.evaluation import LabeledDataConfig, TaskConfig
from clip_exp.errors import DataError
from clip_exp.evaluation.task import LearnedTask

if TYPE_CHECKING:
    from clip_exp.evaluation.evaluated_model import ComputeResult, EvaluatedModel


class LinearProbeTaskConfig(LabeledDataConfig, TaskConfig):
    """Logistic regression on frozen features, fitted on the training images and scored on the test images."""

    kind: Literal["linear_probe"] = "linear_probe"
    train: LabeledDataConfig = Field(default_factory=LabeledDataConfig)
    c: Annotated[list[Positive], NOT_EMPTY] | None = Field(
        None,
        description="inverse regularization to choose from, as [0.1,1,10]; null: the CLIP paper's search, 1e-6 to 1e6",
    )
    val_fraction: Annotated[Proportion, Field(gt=0)] = Field(
        0.2, description="fraction of `train` that chooses; the best is then fitted on all of it"
    )
    max_iter: Count = Field(1000, description="iterations of a fit at most")
    seed: Index = Field(0, description="seed of the choice of that fraction")

    title: ClassVar[str] = "Linear probe"
    unused: ClassVar[tuple[Unused, ...]] = (
        *LabeledDataConfig.unused,
        Unused(
            "val_fraction seed",
            lambda task: task.c is not None and len(task.c) == 1,
            "where {at}c={c.c} leaves no choice",
        ),
    )

    def prepare(self, name: str, output_dir: str, run: Any = None) -> "list[ProbeTask]":
        """Find the training and test images and match their classes."""
        from clip_exp.evaluation.sets.splits import prepare_train_and_test

        train, test, overlap = prepare_train_and_test(name, self, self.train, output_dir)
        require_held_out_images(train.labels, train.class_names, self, name)
        return [ProbeTask(name, self, train, test, overlap)]


def require_held_out_images(
    labels: Sequence[int], class_names: list[str], task: LinearProbeTaskConfig, name: str
) -> None:
    """Check that a fraction of every class can be held out to choose C, if there are several values to choose from.

    Raises:
        DataError: a class has too few images.
    """
    from clip_exp.evaluation.sets.labeled import listing

    if task.c is not None and len(task.c) == 1:
        return
    counts = Counter(labels)
    fix = f"Give a single value (task.{name}.c=[10]), which needs no held-out images."
    if single := sorted(label for label, count in counts.items() if count == 1):
        listed = listing([class_names[label] for label in single])
        raise DataError(f"task.{name}.train: classes with one image, which cannot be held out: {listed}. {fix}")
    held_out = math.ceil(len(labels) * task.val_fraction)
    if min(held_out, len(labels) - held_out) < len(counts):
        raise DataError(
            f"task.{name}.val_fraction={task.val_fraction} of {len(labels)} images: a part would have fewer "
            f"images than the {len(counts)} classes. {fix}"
        )


@dataclass(frozen=True)
class ProbeTask(LearnedTask):
    config: LinearProbeTaskConfig

    def score(self, model: "EvaluatedModel") -> "ComputeResult":
        from clip_exp.evaluation.tasks.linear_probe.score import score_probe  # imports torch

        return score_probe(self, model)
