"""Statistics of scan records: pure functions of arrays, for image sizes, caption lengths and scripts."""

import math
from collections import Counter
from typing import Any

import numpy as np
import regex  # type: ignore[import-untyped]

from clip_exp.config.data import Captions
from clip_exp.text.tokenizer import Tokenizes

QUANTILES = {"min": 0.0, "p1": 0.01, "p5": 0.05, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p95": 0.95, "p99": 0.99, "max": 1.0}  # fmt: skip
STEPS_PER_OCTAVE = 4
MAX_BARS = 100


def quantiles(values: np.ndarray) -> dict[str, float] | None:
    """Return quantiles, each of which is one of the values, and the mean; None without values."""
    if not len(values):
        return None
    found = np.quantile(values, list(QUANTILES.values()), method="inverted_cdf").tolist()
    return {**dict(zip(QUANTILES, found, strict=True)), "mean": float(np.mean(values))}


def octave_histogram(values: np.ndarray) -> dict[str, list[Any]]:
    """Return `edges` and `counts` of a histogram of positive numbers with `STEPS_PER_OCTAVE` bins per octave."""
    if not len(values):
        return {"edges": [], "counts": []}
    places = np.floor(np.log2(values.astype(np.float64)) * STEPS_PER_OCTAVE + 1e-9).astype(np.int64)
    low, high = int(places.min()), int(places.max())
    edges = [2 ** (step / STEPS_PER_OCTAVE) for step in range(low, high + 2)]
    return {"edges": edges, "counts": np.bincount(places - low).tolist()}


def linear_histogram(values: np.ndarray, end: int) -> dict[str, list[Any]]:
    """Return a histogram of integers with equal bins from 0 to at least `end`, and a last bin with all larger values."""
    step = max(1, math.ceil(end / MAX_BARS))
    bars = -(-end // step)
    counts = np.bincount(np.minimum(values // step, bars).astype(np.int64), minlength=bars + 1)
    edges = [*range(0, bars * step + 1, step), max(bars * step, int(values.max(initial=0))) + 1]
    return {"edges": edges, "counts": counts.tolist()}


def fraction(count: int, total: int) -> float:
    """Return `count / total`; 0 if `total` is 0."""
    return count / total if total else 0.0


def counted_fraction(mask: np.ndarray) -> dict[str, Any]:
    """Return the number and the fraction of true values."""
    count = int(np.count_nonzero(mask))
    return {"count": count, "fraction": fraction(count, len(mask))}


# Images: sizes, formats and loading speed.


def describe_images(good: np.ndarray, image_size: int) -> dict[str, Any]:
    """Return statistics of sizes, formats and peculiarities of the images that can be used.

    Args:
        good: records of dtype `scan.IMAGE`.
        image_size: side of the model's input, pixels.
    """

    def by_name(names: np.ndarray) -> dict[str, int]:
        return dict(Counter(map(bytes.decode, sorted(names.tolist()))).most_common())

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
        "smaller_than_input": {**counted_fraction(np.minimum(width, height) < image_size), "image_size": image_size},
        "shorter_side": quantiles(np.minimum(width, height)),
        "formats": by_name(good["format"]),
        "modes": by_name(good["mode"]),
        "exif_rotated": counted_fraction(good["rotated"]),
        "animated": counted_fraction(good["animated"]),
    }


def describe_speed(good: list[np.ndarray], loader_workers: int, decoded: bool) -> dict[str, Any]:
    """Estimate the speed of the data loader in training.

    Args:
        good: records of dtype `scan.IMAGE`, for each split.
        loader_workers: number of worker processes of the loader (`data.num_workers`).
        decoded: True if pixels were decoded; otherwise the speed is unknown.

    Returns: `images_per_s_per_core`: read and decoded; `samples_per_s_per_core`: also cropped and resized;
        `samples_per_s`: all worker processes of one machine together. None where nothing was measured.
    """
    seconds = np.concatenate([records["seconds"] for records in good])
    crop_seconds = np.concatenate([records["crop_seconds"] for records in good])
    crop_seconds = crop_seconds[~np.isnan(crop_seconds)]
    speed: dict[str, Any] = {
        "images_per_s_per_core": None,
        "samples_per_s_per_core": None,
        "loader_workers": loader_workers,
        "samples_per_s": None,
    }
    if decoded and len(seconds):
        decoding = float(np.mean(seconds, dtype=np.float64))
        cropping = float(np.mean(crop_seconds, dtype=np.float64)) if len(crop_seconds) else 0.0
        speed["images_per_s_per_core"] = 1 / decoding
        speed["samples_per_s_per_core"] = 1 / (decoding + cropping)
        speed["samples_per_s"] = max(1, loader_workers) / (decoding + cropping)
    return speed


# Captions.


def equal_pairs_in_batch(captions: np.ndarray, images: np.ndarray, batch_size: int, drawn: Captions) -> float:
    """Return the expected number of pairs of different samples in a batch that have equal captions.

    A sample is an image with one of its captions drawn uniformly, or a row (`data.captions`). The samples of a batch
    are distinct.

    Args:
        captions, images: number of the caption and of the image of each row.
        batch_size: samples per batch, limited to the number of samples.
        drawn: value of `data.captions`.
    """
    weight: np.ndarray
    alone: np.ndarray
    if drawn is Captions.random:
        weight = 1 / np.bincount(images)[images]
        samples = int(images.max()) + 1
        # An image is drawn once per batch, so two of its own captions never meet. Its equal captions count as one, with
        # their weight.
        _, of_pair = np.unique(captions * samples + images, return_inverse=True)
        alone = np.bincount(of_pair, weight)
    else:
        weight = alone = np.ones(len(captions))
        samples = len(captions)
    both = np.bincount(captions, weight)
    pairs_in_data = (float(np.sum(both**2)) - float(np.sum(alone**2))) / 2
    batch_size = min(batch_size, samples)
    return max(0.0, pairs_in_data) * batch_size * (batch_size - 1) / max(samples * (samples - 1), 1)


# Scripts: the writing system of a caption, and how many tokens it takes.

# Values of the Unicode property Script (UAX 24). A caption has the script of most of its letters.
SCRIPTS = (
    "no letters", "Latin", "Han", "Hiragana", "Katakana", "Hangul", "Bopomofo", "Cyrillic", "Greek", "Armenian", "Georgian",
    "Arabic", "Hebrew", "Syriac", "Thaana", "Devanagari", "Bengali", "Gurmukhi", "Gujarati", "Oriya", "Tamil", "Telugu",
    "Kannada", "Malayalam", "Sinhala", "Thai", "Lao", "Khmer", "Myanmar", "Tibetan", "Mongolian", "Ethiopic", "Cherokee", "other",
)  # fmt: skip
NO_LETTERS, LATIN, OTHER = 0, 1, len(SCRIPTS) - 1
# Tokens per character, relative to English. OpenAI's BPE: Han 11, Arabic 4; XLM-R: Han 2.6, Arabic 1.2.
SPLIT_BADLY = 3.0
ENGLISH = (
    "a photo of a dog running on the beach with a ball in its mouth",
    "Two children in red jackets play in the snow.",
    "A man is riding his bicycle along a street of old houses, and a woman waits at the corner with an umbrella.",
    "close-up of fresh vegetables on a wooden table",
)

_RUNS = regex.compile(
    "|".join(rf"(?P<{name}>\p{{Script={name}}}+)" for name in SCRIPTS[1:-1]) + rf"|(?P<{SCRIPTS[-1]}>\p{{L}})"
)
_NUMBER = {name: number for number, name in enumerate(SCRIPTS)}


def script_of(caption: str) -> int:
    """Return the index in `SCRIPTS` of the script of most letters of a caption."""
    if caption.isascii():
        return LATIN if any(map(str.isalpha, caption)) else NO_LETTERS
    letters = [0] * len(SCRIPTS)
    for run in _RUNS.finditer(caption):
        letters[_NUMBER[run.lastgroup]] += run.end() - run.start()
    return int(np.argmax(letters)) if any(letters) else NO_LETTERS


def english_tokens_per_character(tokenizer: Tokenizes, special: int) -> float:
    """Return the tokens per character of fixed English captions, the reference for other scripts."""
    tokens = sum(len(ids) - special for ids in tokenizer.encode_batch(ENGLISH))
    return tokens / sum(map(len, ENGLISH))
