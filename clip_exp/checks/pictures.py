"""What the pictures of a split are like, and how fast they can be had."""

from collections import Counter
from typing import Any

import numpy as np

from clip_exp.checks.distributions import counted_share, octave_histogram, quantiles


def describe_pictures(good: np.ndarray, image_size: int) -> dict[str, Any]:
    """Sizes, formats and oddities of the pictures that can be used.

    Args:
        good: of `scan.PICTURE`.
        image_size: side of the model's input, pixels.
    """
    width, height = good["width"], good["height"]
    measures = {
        "width": width,
        "height": height,
        "megapixels": width.astype(np.int64) * height / 1e6,
        "bytes": good["bytes"],
    }
    return {
        "sizes": {name: quantiles(values) for name, values in measures.items()},
        "histograms": {name: octave_histogram(values) for name, values in measures.items()},
        "smaller_than_input": {**counted_share(np.minimum(width, height) < image_size), "image_size": image_size},
        "shorter_side": quantiles(np.minimum(width, height)),
        "formats": _by_name(good["format"]),
        "modes": _by_name(good["mode"]),
        "exif_rotated": counted_share(good["rotated"]),
        "animated": counted_share(good["animated"]),
    }


def describe_speed(good: list[np.ndarray], loader_workers: int, decoded: bool) -> dict[str, Any]:
    """What the loader of a training could give.

    Args:
        good: of `scan.PICTURE`, of each split.
        loader_workers: processes that it would have (`data.num_workers`).
        decoded: whether pixels were decoded; without them nothing is known.

    Returns: `pictures_per_s_per_core`: read and decoded; `samples_per_s_per_core`: also cropped and resized;
        `samples_per_s`: of all of the loader's processes on one machine. None where nothing was measured.
    """
    seconds = np.concatenate([records["seconds"] for records in good])
    crop_seconds = np.concatenate([records["crop_seconds"] for records in good])
    crop_seconds = crop_seconds[~np.isnan(crop_seconds)]
    speed: dict[str, Any] = {
        "pictures_per_s_per_core": None,
        "samples_per_s_per_core": None,
        "loader_workers": loader_workers,
        "samples_per_s": None,
    }
    if decoded and len(seconds):
        decoding = float(np.mean(seconds, dtype=np.float64))
        cropping = float(np.mean(crop_seconds, dtype=np.float64)) if len(crop_seconds) else 0.0
        speed["pictures_per_s_per_core"] = 1 / decoding
        speed["samples_per_s_per_core"] = 1 / (decoding + cropping)
        speed["samples_per_s"] = max(1, loader_workers) / (decoding + cropping)
    return speed


def _by_name(names: np.ndarray) -> dict[str, int]:
    found, counts = np.unique(names, return_counts=True)
    named = {name.decode(): count for name, count in zip(found.tolist(), counts.tolist(), strict=True)}
    return dict(Counter(named).most_common())
