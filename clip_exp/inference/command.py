"""What predict, rank and search share before torch is imported."""

from typing import Any

from clip_exp.config.use_schema import UseConfig
from clip_exp.devices import check_accelerator
from clip_exp.errors import Problems
from clip_exp.evaluation.launch import problems_of
from clip_exp.inference.outputs import check_output
from clip_exp.loading.source import ModelSource


def check_common(config: UseConfig, problems: Problems, **counts: int | None) -> None:
    """Note what is wrong with the keys that the commands share.

    Args:
        counts: keys that must be above 0, or None.
    """
    problems.add(*problems_of(config))
    for key, value in {**counts, "frames": config.frames}.items():
        if value is not None and value < 1:
            problems.add(f"{key}={value} must be above 0.")
    with problems:
        check_accelerator(config.accelerator)
    with problems:
        check_output(config)


def about(source: ModelSource) -> dict[str, Any]:
    """For JSON: the model."""
    return {"model": source.model.name, "weights": str(source.weights.resolve())}
