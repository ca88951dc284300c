"""HTML report of a data check: findings, statistics and sample images."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip_exp.reports.html import Thumbnail, counted, fact_rows, probability, render

SHOWN_FREQUENT = 12
QUANTILES = ("min", "p1", "p5", "p50", "p95", "p99", "max")
MAX_TICKS = 4
MIN_OCTAVES = 4


@dataclass(frozen=True)
class ImageExample:
    """Image with some of its captions."""

    thumbnail: Thumbnail
    captions: list[str]
    more: int  # number of captions that are not shown


@dataclass(frozen=True)
class DuplicateImage:
    """Image that exists several times, shown once."""

    thumbnail: Thumbnail
    paths: list[tuple[str, str]]  # split and path of each


@dataclass(frozen=True)
class Gallery:
    """Images for the report."""

    samples: dict[str, list[ImageExample]]  # by split
    copies: list[DuplicateImage]
    leaks: list[DuplicateImage]


def data_report(report: dict[str, Any], gallery: Gallery, folder: Path, command: str) -> str:
    """Return the HTML report of a data check.

    Args:
        report: content of `report.json`.
        gallery: images to show.
        folder: folder of the report.
        command: command line of the check.
    """
    model, settings, speed, splits = report["model"], report["settings"], report["speed"], report["splits"]
    files = [Path(file["file"]).name for split in splits.values() for file in split["files"]]
    more = f" and {counted(len(files) - 3, 'more file')}" if len(files) > 3 else ""
    overview: dict[str, Callable[[dict[str, Any]], str]] = {
        "files": lambda split: f"{len(split['files']):,}",
        "rows": lambda split: f"{split['rows']:,}",
        "bad rows": lambda split: _count(split["bad_rows"]),
        "distinct images": lambda split: f"{split['images']:,}",
        "images checked": lambda split: f"{split['images_checked']:,}",
        "bad images": lambda split: _count(split["bad_images"]),
        "copies of images": lambda split: f"{split['duplicates']['images']['copies']:,}",
        "duplicate pairs": lambda split: f"{split['duplicates']['pairs']['copies']:,}",
        "smaller than the input": lambda split: _count(split["smaller_than_input"]),
        "rotated by EXIF": lambda split: _count(split["exif_rotated"]),
        "animated": lambda split: _count(split["animated"]),
        "distinct captions": lambda split: f"{split['captions']['distinct']:,}",
        "truncated captions": lambda split: _count(split["captions"]["truncated"]),
        "empty captions": lambda split: _count(split["captions"]["empty"]),
        "pairs with equal captions in a batch": lambda split: f"{split['captions']['equal_in_batch']['pairs']:,.1f}",
    }
    facts = {
        "model": f"{model['name']}: images of {model['image_size']} pixels, {model['context_length']} tokens",
        "images decoded": "yes" if settings["decode"] else "no, only the headers were read (decode=false)",
        "images checked": "all"
        if settings["max_images"] is None
        else f"a random sample of at most {settings['max_images']:,} of each split (max_images)",
        "images per second": speed["images_per_s_per_core"]
        and f"{speed['images_per_s_per_core']:,.0f} read and decoded by one core, {speed['samples_per_s_per_core']:,.0f} cropped too",
        "files": {
            name: {"tables": [f"{file['file']}: {file['rows']:,} rows" for file in split["files"]]}
            for name, split in splits.items()
        },
    }
    return render(
        "data.html",
        title=report["name"],
        kind="Data check",
        about=[
            ", ".join(files[:3]) + more,
            f"for {model['name']}: {model['image_size']} pixels, {model['context_length']} tokens",
        ],
        made_by=str(folder),
        tiles=_tiles(report),
        verdicts=report["verdicts"],
        overview=[(name, [value(split) for split in splits.values()]) for name, value in overview.items()],
        names=list(splits),
        splits=[_split(name, split) for name, split in splits.items()],
        leakage=report["leakage"],
        gallery=gallery,
        facts=fact_rows(facts),
        command=command,
    )


def _tiles(report: dict[str, Any]) -> list[dict[str, str]]:
    splits, speed = report["splits"], report["speed"]
    train, val = splits["train"], splits.get("val")

    def tile(name: str, value: Callable[[dict[str, Any]], str], meaning: str) -> dict[str, str]:
        return {"name": name, "value": value(train), "meaning": meaning + (f"; {value(val)} in val" if val else "")}

    tiles = [
        tile("Pairs", lambda split: f"{split['rows']:,}", f"of {counted(train['images'], 'image')}"),
        tile("Bad images", lambda split: _fraction(split["bad_images"]), "cannot be used"),
        tile(
            "Truncated captions",
            lambda split: _fraction(split["captions"]["truncated"]),
            "longer than the context length",
        ),
    ]
    if speed["samples_per_s"] is not None:
        meaning = f"maximum of {loaders(speed['loader_workers'])} on this machine"
        tiles.append({"name": "Pairs per second", "value": f"{speed['samples_per_s']:,.0f}", "meaning": meaning})
    return tiles


def loaders(workers: int) -> str:
    """Return the name of the processes that load images with `data.num_workers=workers`."""
    return counted(workers, "loader process", "loader processes") if workers else "the training process"


def _fraction(part: dict[str, Any]) -> str:
    return probability(part["fraction"]) if part["count"] else "none"


def _count(part: dict[str, Any]) -> str:
    return f"{part['count']:,} ({probability(part['fraction'])})" if part["count"] else "0"


def _split(name: str, split: dict[str, Any]) -> dict[str, Any]:
    captions, histograms, input_size = split["captions"], split["histograms"], split["smaller_than_input"]["image_size"]
    room = captions["context_length"]
    named = {"width": _whole, "height": _whole, "megapixels": _short, "bytes": _file_size}
    return {
        "name": name,
        "bad_images": split["bad_images"],
        "bad_rows": split["bad_rows"],
        "repeated": split["duplicates"]["pairs"],
        "histograms": [
            log_bars("width, pixels", histograms["width"], _whole, input_size),
            log_bars("height, pixels", histograms["height"], _whole, input_size),
            log_bars("megapixels", histograms["megapixels"], _short),
            log_bars("file size", histograms["bytes"], _file_size),
        ]
        if split["sizes"]["width"] is not None
        else [],
        "quantiles": [
            ("file size" if name == "bytes" else name, [named[name](found[quantile]) for quantile in QUANTILES])
            for name, found in split["sizes"].items()
            if found is not None
        ],
        "quantile_names": QUANTILES,
        "formats": [*split["formats"].items()],
        "modes": [*split["modes"].items()],
        "lengths": linear_bars("tokens, including start and end", captions["histogram"], room + 1),
        "captions": captions,
        "frequent": captions["most_frequent"][:SHOWN_FREQUENT],
        "scripts": [
            {"name": script, "fit": (room - 2) / max(found["tokens_per_character"], 1e-9), **found}
            for script, found in captions["scripts"].items()
        ],
    }


@dataclass(frozen=True)
class Bar:
    height: float  # relative to the highest bar
    text: str  # range and count
    odd: bool  # highlighted


@dataclass(frozen=True)
class Tick:
    place: float  # from 0 (left) to 1 (right)
    text: str


@dataclass(frozen=True)
class Histogram:
    title: str
    bars: list[Bar]
    ticks: list[Tick]


def log_bars(
    title: str, histogram: dict[str, list[Any]], named: Callable[[float], str], odd_below: float = 0.0
) -> Histogram:
    """Prepare a logarithmic histogram (`checks.statistics.octave_histogram`), extended to powers of 2.

    Args:
        named: function that formats a value.
        odd_below: bars below this value are highlighted.
    """
    edges, counts = histogram["edges"], histogram["counts"]
    steps = round(1 / math.log2(edges[1] / edges[0]))
    first, last = round(math.log2(edges[0]) * steps), round(math.log2(edges[-1]) * steps)
    low, high = math.floor(first / steps), math.ceil(last / steps)
    missing = max(0, MIN_OCTAVES - (high - low))
    low, high = low - missing // 2, high + (missing + 1) // 2
    padded = [0] * (first - low * steps) + counts + [0] * (high * steps - last)
    highest = max(counts)
    bars = []
    for at, count in enumerate(padded):
        start, end = 2 ** (low + at / steps), 2 ** (low + (at + 1) / steps)
        bars.append(Bar(count / highest, f"{named(start)} to {named(end)}: {count:,}", end <= odd_below * 1.001))
    every = math.ceil((high - low) / MAX_TICKS)
    ticks = [Tick((octave - low) / (high - low), named(2.0**octave)) for octave in range(low, high + 1, every)]
    return Histogram(title, bars, ticks)


def linear_bars(title: str, histogram: dict[str, list[Any]], odd_from: int) -> Histogram:
    """Prepare a linear histogram whose last bin has all larger values (`checks.statistics.linear_histogram`).

    Args:
        odd_from: bars that start at this value or above are highlighted.
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
        if size * MAX_TICKS >= step * width
    )
    ticks = [Tick(value / step / width, f"{value:,}") for value in range(0, step * (width - 1), every)]
    return Histogram(title, bars, ticks)


def _whole(value: float) -> str:
    return f"{value:,.0f}"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}" if value >= 0.1 else f"{value:.1g}"


def _file_size(value: float) -> str:
    for unit, size in (("MB", 1 << 20), ("KB", 1 << 10)):
        if value >= size:
            return f"{_short(value / size)} {unit}"
    return f"{value:.0f} B"
