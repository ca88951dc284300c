"""What predict, rank and search share: checks before torch is imported, and the model that a configuration names."""

from typing import TYPE_CHECKING, Any

from clip_exp.config.use_schema import UseConfig
from clip_exp.devices import check_accelerator
from clip_exp.evaluation.run import problems_of
from clip_exp.inference.inputs import Problems
from clip_exp.inference.outputs import check_output
from clip_exp.inference.sources import Source

if TYPE_CHECKING:
    from clip_exp.inference.clip import Clip


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


def open_clip(config: UseConfig, source: Source) -> "Clip":
    """The model, ready to use as the configuration says; imports torch.

    Raises:
        ConfigError: no such accelerator here.
        CheckpointError: the weights cannot be read, or are another model's.
    """
    from clip_exp.evaluation.encode import encode_options
    from clip_exp.inference.clip import Clip
    from clip_exp.inference.loading import load_model

    options = encode_options(config)
    clip = Clip(load_model(source, options.device), source.model, options.device, options, source)
    clip.frames = config.frames or clip.frames
    return clip


def about(source: Source) -> dict[str, Any]:
    """For JSON: the model."""
    return {"model": source.model.name, "weights": str(source.weights.resolve())}
