"""Histograms for a page: bars of equal width with marks below them."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MOST_TICKS = 4
FEWEST_OCTAVES = 4


@dataclass(frozen=True)
class Bar:
    share: float  # of the highest bar
    text: str  # what it counts
    odd: bool  # to be pointed out


@dataclass(frozen=True)
class Tick:
    place: float  # 0 is the left end, 1 the right one
    text: str


@dataclass(frozen=True)
class Histogram:
    title: str
    bars: list[Bar]
    ticks: list[Tick]


def of_octaves(
    title: str, histogram: dict[str, list[Any]], named: Callable[[float], str], odd_below: float = 0.0
) -> Histogram:
    """Of counts between steps of an octave (`checks.distributions.octave_histogram`), from one power of 2 to another.

    Args:
        named: a value for reading.
        odd_below: bars that lie below this value are pointed out.
    """
    edges, counts = histogram["edges"], histogram["counts"]
    steps = round(1 / math.log2(edges[1] / edges[0]))
    first, last = round(math.log2(edges[0]) * steps), round(math.log2(edges[-1]) * steps)
    low, high = math.floor(first / steps), math.ceil(last / steps)
    missing = max(0, FEWEST_OCTAVES - (high - low))
    low, high = low - missing // 2, high + (missing + 1) // 2
    padded = [0] * (first - low * steps) + counts + [0] * (high * steps - last)
    highest = max(counts)
    bars = []
    for at, count in enumerate(padded):
        start, end = 2 ** (low + at / steps), 2 ** (low + (at + 1) / steps)
        bars.append(Bar(count / highest, f"{named(start)} to {named(end)}: {count:,}", end <= odd_below * 1.001))
    every = math.ceil((high - low) / MOST_TICKS)
    ticks = [Tick((octave - low) / (high - low), named(2.0**octave)) for octave in range(low, high + 1, every)]
    return Histogram(title, bars, ticks)


def of_whole_numbers(title: str, histogram: dict[str, list[Any]], odd_from: int) -> Histogram:
    """Of counts in equal steps, the last of which holds all above (`checks.distributions.whole_histogram`).

    Args:
        odd_from: bars that begin at this value or above are pointed out.
    """
    edges, counts = histogram["edges"], histogram["counts"]
    highest, width = max(1, *counts), len(counts)
    bars = []
    for start, end, count in zip(edges, edges[1:], counts, strict=False):
        text = f"{start:,}" if end - start <= 1 else f"{start:,} to {end - 1:,}"
        bars.append(Bar(count / highest, f"{text}: {count:,}", start >= odd_from))
    step = edges[1] - edges[0]
    every = next(
        size
        for power in range(9)
        for size in (10**power, 2 * 10**power, 5 * 10**power)
        if size * MOST_TICKS >= step * width
    )
    ticks = [Tick(value / step / width, f"{value:,}") for value in range(0, step * (width - 1), every)]
    return Histogram(title, bars, ticks)
