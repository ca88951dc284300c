"""The page of a data check: what was found, the data in figures, and some of its images."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip_exp.reports.html import Thumbnail, counted, fact_rows, probability, render

SHOWN_FREQUENT = 12
QUANTILES = ("min", "p1", "p5", "p50", "p95", "p99", "max")
MOST_TICKS = 4
FEWEST_OCTAVES = 4


@dataclass(frozen=True)
class ImageExample:
    """An image with some of its captions."""

    thumbnail: Thumbnail
    captions: list[str]
    more: int  # captions that are not shown


@dataclass(frozen=True)
class Equal:
    """An image that there is more than once, shown once."""

    thumbnail: Thumbnail
    paths: list[tuple[str, str]]  # split and path of each


@dataclass(frozen=True)
class Gallery:
    """Images for the page."""

    samples: dict[str, list[ImageExample]]  # by split
    copies: list[Equal]
    leaks: list[Equal]


def data_page(report: dict[str, Any], gallery: Gallery, folder: Path, command: str) -> str:
    """The HTML of a check's page.

    Args:
        report: as in `report.json`.
        folder: where it lies.
        command: that made it.
    """
    model, settings, speed, splits = report["model"], report["settings"], report["speed"], report["splits"]
    files = [Path(file["file"]).name for split in splits.values() for file in split["files"]]
    more = f" and {counted(len(files) - 3, 'more file')}" if len(files) > 3 else ""
    overview: dict[str, Callable[[dict[str, Any]], str]] = {
        "files": lambda split: f"{len(split['files']):,}",
        "rows": lambda split: f"{split['rows']:,}",
        "bad rows": lambda split: _count(split["bad_rows"]),
        "distinct images": lambda split: f"{split['images']:,}",
        "of them checked": lambda split: f"{split['images_checked']:,}",
        "bad images": lambda split: _count(split["bad_images"]),
        "copies of images": lambda split: f"{split['duplicates']['images']['copies']:,}",
        "repeated pairs": lambda split: f"{split['duplicates']['pairs']['copies']:,}",
        "smaller than the input": lambda split: _count(split["smaller_than_input"]),
        "turned by EXIF": lambda split: _count(split["exif_rotated"]),
        "animated": lambda split: _count(split["animated"]),
        "distinct captions": lambda split: f"{split['captions']['distinct']:,}",
        "captions cut": lambda split: _count(split["captions"]["truncated"]),
        "empty captions": lambda split: _count(split["captions"]["empty"]),
        "equal pairs in a batch": lambda split: f"{split['captions']['equal_in_batch']['pairs']:,.1f}",
    }
    facts = {
        "model": f"{model['name']}: images of {model['image_size']} pixels, {model['context_length']} tokens",
        "images decoded": "yes" if settings["decode"] else "no: read, and their headers looked at (decode=false)",
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
        tile("Bad images", lambda split: _share(split["bad_images"]), "cannot be used"),
        tile("Captions cut", lambda split: _share(split["captions"]["truncated"]), "longer than the context"),
    ]
    if speed["samples_per_s"] is not None:
        meaning = f"the most that {loaders(speed['loader_workers'])} can give here"
        tiles.append({"name": "Pairs per second", "value": f"{speed['samples_per_s']:,.0f}", "meaning": meaning})
    return tiles


def loaders(workers: int) -> str:
    """Who loads training's images, where `data.num_workers` is `workers`."""
    return counted(workers, "loader process", "loader processes") if workers else "training's own process"


def _share(part: dict[str, Any]) -> str:
    return probability(part["share"]) if part["count"] else "none"


def _count(part: dict[str, Any]) -> str:
    return f"{part['count']:,} ({probability(part['share'])})" if part["count"] else "0"


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
            of_octaves("width, pixels", histograms["width"], _whole, input_size),
            of_octaves("height, pixels", histograms["height"], _whole, input_size),
            of_octaves("megapixels", histograms["megapixels"], _short),
            of_octaves("size of the file", histograms["bytes"], _file_size),
        ]
        if split["sizes"]["width"] is not None
        else [],
        "quantiles": [
            ("file" if name == "bytes" else name, [named[name](found[quantile]) for quantile in QUANTILES])
            for name, found in split["sizes"].items()
            if found is not None
        ],
        "quantile_names": QUANTILES,
        "formats": [*split["formats"].items()],
        "modes": [*split["modes"].items()],
        "lengths": of_whole_numbers("tokens, start and end included", captions["histogram"], room + 1),
        "captions": captions,
        "frequent": captions["most_frequent"][:SHOWN_FREQUENT],
        "scripts": [
            {"name": script, "fit": (room - 2) / max(found["tokens_per_character"], 1e-9), **found}
            for script, found in captions["scripts"].items()
        ],
    }


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
    """Of counts between steps of an octave (`checks.statistics.octave_histogram`), from one power of 2 to another.

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
    """Of counts in equal steps, the last of which holds all above (`checks.statistics.whole_histogram`).

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


def _whole(value: float) -> str:
    return f"{value:,.0f}"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}" if value >= 0.1 else f"{value:.1g}"


def _file_size(value: float) -> str:
    for unit, size in (("MB", 1 << 20), ("KB", 1 << 10)):
        if value >= size:
            return f"{_short(value / size)} {unit}"
    return f"{value:.0f} B"
