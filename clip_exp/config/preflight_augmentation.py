"""Checks of what is drawn for training pictures."""

import math
from collections.abc import Iterator

from clip_exp.config.data_schema import AugmentationConfig

KEY = "data.augmentation"


def augmentation_problems(augmentation: AugmentationConfig) -> Iterator[str]:
    """What makes an augmentation impossible, a line each."""
    for key in ("horizontal_flip", "color_jitter_prob", "gray_scale_prob", "gaussian_blur_prob"):
        probability = getattr(augmentation, key)
        if not 0 <= probability <= 1:
            yield f"{KEY}.{key}={probability} must be a probability, from 0 to 1."
    yield from _check_bounds("scale", augmentation.scale, 1.0)
    yield from _check_bounds("ratio", augmentation.ratio, math.inf)
    yield from _check_bounds("gaussian_blur_sigma", augmentation.gaussian_blur_sigma, math.inf)
    jitter = augmentation.color_jitter
    if jitter is not None and not (
        len(jitter) == 4 and all(0 <= strength < math.inf for strength in jitter) and jitter[3] <= 0.5
    ):
        yield (
            f"{KEY}.color_jitter={jitter} must be four strengths from 0, of brightness, contrast, saturation and hue, the last "
            "at most 0.5; or null."
        )


def _check_bounds(key: str, bounds: list[float], most: float) -> Iterator[str]:
    if len(bounds) != 2 or not 0 < bounds[0] <= bounds[1] < math.inf or bounds[1] > most:
        at_most = f", at most {most:g}" if most < math.inf else ""
        yield f"{KEY}.{key}={bounds} must be two positive numbers, the smaller first{at_most}."
