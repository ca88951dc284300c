"""What predict, rank and search share: checks before torch is imported, and the model that a configuration names."""

from typing import TYPE_CHECKING, Any

from clip_exp.config.use_schema import UseConfig
from clip_exp.errors import Problems
from clip_exp.evaluation.check import problems_of
from clip_exp.inference.outputs import check_output
from clip_exp.loading.source import ModelSource

if TYPE_CHECKING:
    from clip_exp.inference.pipeline import Pipeline


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
        check_output(config)


def open_clip(config: UseConfig, source: ModelSource) -> "Pipeline":
    """The model, ready to use as the configuration says; imports torch.

    Raises:
        ConfigError: no such accelerator here.
        CheckpointError: the weights cannot be read, or are another model's.
    """
    from clip_exp.evaluation.encode import encode_options
    from clip_exp.inference.pipeline import Pipeline
    from clip_exp.loading.model import load_model

    options = encode_options(config)
    clip = Pipeline(load_model(source, options.device), source.model, options.device, options, source)
    clip.frames = config.frames or clip.frames
    return clip


def about(source: ModelSource) -> dict[str, Any]:
    """For JSON: the model."""
    return {"model": source.model.name, "weights": str(source.weights.resolve())}
