"""Evaluation task that is the user's own object, named by `_target_`. Does not import torch."""

from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from clip_exp.config.base import Target
from clip_exp.config.evaluation import TaskConfig
from clip_exp.config.targets import instantiate
from clip_exp.errors import ConfigError, DataError
from clip_exp.evaluation.task import Task

if TYPE_CHECKING:
    from clip_exp.evaluation.evaluated_model import ComputeResult, EvaluatedModel

Metrics = dict[str, float]


class CustomTaskConfig(TaskConfig, Target):
    """Object with a method `score(model)`, which returns metrics by name, and optionally their names in `metrics`."""

    kind: Literal["custom"] = "custom"
    target: str = Field(alias="_target_", description="full name of the task's class")

    title: ClassVar[str] = "Custom task"
    optional: ClassVar[tuple[str, ...]] = ("output_dir", "run")

    def prepare(self, name: str, output_dir: str, run: Any = None) -> "list[CustomTask]":
        """Create the user's object."""
        user: Any = instantiate(self, f"task.{name}", optional={"output_dir": output_dir, "run": run})
        if not callable(getattr(user, "score", None)):
            raise ConfigError(f"task.{name}._target_={self.target} has no method score(model), which a task needs.")
        return [CustomTask(name, self, user)]


@dataclass(frozen=True)
class CustomTask(Task):
    config: CustomTaskConfig
    user: Any  # object of the user

    @property
    def metrics(self) -> list[str]:
        return list(getattr(self.user, "metrics", ()))

    def score(self, model: "EvaluatedModel") -> "ComputeResult":
        from clip_exp.reports.evaluation import Result

        scored: Metrics | Callable[[], Metrics] = self.user.score(model)

        def compute_result() -> Result:
            metrics = scored() if callable(scored) else scored
            return Result(self._checked(metrics), {"task": self.config.node})

        return compute_result

    def _checked(self, metrics: Any) -> Metrics:
        try:
            values = {str(name): float(value) for name, value in metrics.items()}
        except (AttributeError, TypeError, ValueError):
            raise DataError(
                f"task.{self.name}: score of {self.config.target} must return a mapping from names of metrics to numbers, or a function "
                f"that returns one, but returned {type(metrics).__name__}."
            ) from None
        if broken := [name for name, value in values.items() if not isfinite(value)]:
            raise DataError(f"task.{self.name}: {broken[0]} of {self.config.target} is not finite.")
        return values
