"""A great many numbers in few: quantiles and histograms, as JSON has them."""

import math
from typing import Any

import numpy as np

QUANTILES = {"min": 0.0, "p1": 0.01, "p5": 0.05, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p95": 0.95, "p99": 0.99, "max": 1.0}  # fmt: skip
STEPS_PER_OCTAVE = 4
MAX_BARS = 100


def quantiles(values: np.ndarray) -> dict[str, float] | None:
    """Quantiles that are among the values, and the mean; None of no values."""
    if not len(values):
        return None
    found = np.quantile(values, list(QUANTILES.values()), method="inverted_cdf").tolist()
    return {**dict(zip(QUANTILES, found, strict=True)), "mean": float(np.mean(values))}


def octave_histogram(values: np.ndarray) -> dict[str, list[Any]]:
    """Counts of positive numbers between powers of 2 to the quarter: `edges`, one more than `counts`."""
    if not len(values):
        return {"edges": [], "counts": []}
    places = np.floor(np.log2(values.astype(np.float64)) * STEPS_PER_OCTAVE + 1e-9).astype(np.int64)
    low, high = int(places.min()), int(places.max())
    edges = [2 ** (step / STEPS_PER_OCTAVE) for step in range(low, high + 2)]
    return {"edges": edges, "counts": np.bincount(places - low).tolist()}


def whole_histogram(values: np.ndarray, end: int) -> dict[str, list[Any]]:
    """Counts of whole numbers in equal steps from 0 to `end` or beyond; the last holds all above, its edge the largest."""
    step = max(1, math.ceil(end / MAX_BARS))
    bars = -(-end // step)
    counts = np.bincount(np.minimum(values // step, bars).astype(np.int64), minlength=bars + 1)
    edges = [*range(0, bars * step + 1, step), max(bars * step, int(values.max(initial=0))) + 1]
    return {"edges": edges, "counts": counts.tolist()}


def share(count: int, total: int) -> float:
    """0 of nothing."""
    return count / total if total else 0.0


def counted_share(mask: np.ndarray) -> dict[str, Any]:
    """How many, and which part of all."""
    count = int(np.count_nonzero(mask))
    return {"count": count, "share": share(count, len(mask))}
