"""What the captions of a split are like: their lengths, and which of them are the same to the model."""

from collections.abc import Callable
from typing import Any

import numpy as np

from clip_exp.checks.distributions import counted_share, quantiles, whole_histogram
from clip_exp.config.data import Captions

FREQUENT = 20


def describe_lengths(rows: np.ndarray, context_length: int, special: int) -> dict[str, Any]:
    """Tokens of captions, with the `special` ones that each has.

    Args:
        rows: of `scan.ROW`.
        context_length: tokens that the model sees of a caption.

    Returns: quantiles, histogram, which captions are cut and which are empty.
    """
    tokens = rows["tokens"].astype(np.int64) + special
    cut = tokens > context_length
    return {
        "count": len(rows),
        "context_length": context_length,
        "tokens": quantiles(tokens),
        "histogram": whole_histogram(tokens, context_length + 1),
        "truncated": counted_share(cut),
        "empty": counted_share(rows["characters"] == 0),
    }


def spread_examples(mask: np.ndarray, count: int) -> list[int]:
    """Up to `count` numbers of rows that the mask holds, evenly from the first to the last."""
    found = np.flatnonzero(mask)
    if len(found) > count:
        found = found[np.linspace(0, len(found) - 1, count).round().astype(np.int64)]
    return found.tolist()


def number_captions(rows: list[np.ndarray]) -> list[np.ndarray]:
    """int64, of each split: equal captions have equal numbers over all splits."""
    numbers = np.unique(np.concatenate([records["caption"] for records in rows]), return_inverse=True)[1]
    return np.split(numbers, np.cumsum([len(records) for records in rows])[:-1])


def describe_repeats(captions: np.ndarray, text: Callable[[int], str]) -> dict[str, Any]:
    """Distinct captions, and those that stand in most rows.

    Args:
        captions: number of each row's (`number_captions`).
        text: the caption of a row.
    """
    _, first, counts = np.unique(captions, return_index=True, return_counts=True)
    order = np.lexsort((first, -counts))[:FREQUENT]
    frequent = [{"caption": text(int(first[at])), "rows": int(counts[at])} for at in order if counts[at] > 1]
    return {"distinct": len(counts), "most_frequent": frequent}


def equal_pairs_in_batch(captions: np.ndarray, pictures: np.ndarray, batch_size: int, drawn: Captions) -> float:
    """How many pairs of different samples of a batch are expected to have equal captions.

    A sample is a picture with one of its captions drawn evenly, or each row is one (`data.captions`); a batch holds
    distinct samples.

    Args:
        captions, pictures: number of each row's.
        batch_size: samples of a batch; more than there are count as all.
    """
    if drawn is Captions.random:
        weight = 1 / np.bincount(pictures)[pictures]
        samples = int(pictures.max()) + 1
    else:
        weight, samples = np.ones(len(captions)), len(captions)
    both = np.bincount(captions, weight)
    if drawn is Captions.random:
        # A picture is drawn once, so its own captions do not meet; equal ones of it are one choice of that weight.
        _, of_pair = np.unique(captions * samples + pictures, return_inverse=True)
        alone = np.bincount(of_pair, weight)
    else:
        alone = weight
    pairs_in_data = (float(np.sum(both**2)) - float(np.sum(alone**2))) / 2
    batch_size = min(batch_size, samples)
    return max(0.0, pairs_in_data) * batch_size * (batch_size - 1) / max(samples * (samples - 1), 1)
