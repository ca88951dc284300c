"""Numbers that a configuration may hold."""

from collections.abc import Iterator, Mapping
from typing import Any

INFINITY = float("inf")
TINY = 5e-324  # above zero


def range_problems(ranges: Mapping[str, tuple[Any, float, float]]) -> Iterator[str]:
    """A line for every number out of its range.

    Args:
        ranges: by key the value, the least and the most it may be; a value that is null is its own default.
    """
    for key, (value, low, high) in ranges.items():
        if value is not None and not low <= value <= high:
            yield f"{key}={value} must be {_bound(value, low, high)}."


def _bound(value: float, low: float, high: float) -> str:
    if low in (TINY, 1) and not value >= low:
        return "above 0"
    return f"{low:g} or more" if high == INFINITY else f"between {low:g} and {high:g}"
