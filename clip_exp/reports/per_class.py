"""Each class of a classification, and `eval/<task>.csv` with a row for each.

Columns of the file, in the order of the classes:
    key: the folder or label of the class in the data; empty where the data lack it.
    name: what it was scored as.
    pictures: how many of them were scored.
    top1, top5: share of these whose first choice, or one of whose first five choices, is right; empty without pictures, top5 also
        of five classes or fewer, where it would be 1 for any model.
    most_often_taken_for: the class that its wrong pictures were given most often; empty without mistakes.
    share: of its pictures that were given that class.
    predicted: pictures of any class whose first choice it is.
"""

from collections import Counter
from dataclasses import dataclass
from io import StringIO

import numpy as np

from clip_exp.reports.metric_names import CERTAIN
from clip_exp.reports.results import Classified
from clip_exp.spreadsheets import TextWriter

COLUMNS = ("key", "name", "pictures", "top1", "top5", "most_often_taken_for", "share", "predicted")


@dataclass(frozen=True)
class PerClass:
    """Counts of pictures, each int64 [C]."""

    pictures: np.ndarray
    right: np.ndarray  # first choice
    among_five: np.ndarray
    predicted: np.ndarray  # of any class, first choice
    mistaken_for: np.ndarray  # the most frequent wrong first choice, of equals the first class; -1: none
    mistaken: np.ndarray  # how often


@dataclass(frozen=True)
class Mistakes:
    """How often pictures of one class were given another, the most frequent first; each int64 [P]."""

    true: np.ndarray
    predicted: np.ndarray
    count: np.ndarray


def mistakes(details: Classified) -> Mistakes:
    """All pairs of a class and another that its pictures were given; of equally frequent ones the first classes."""
    classes = len(details.class_names)
    predicted = details.best[:, 0]
    wrong = predicted != details.labels
    pairs, count = np.unique(details.labels[wrong] * classes + predicted[wrong], return_counts=True)
    order = np.argsort(-count, kind="stable")
    return Mistakes(pairs[order] // classes, pairs[order] % classes, count[order])


def per_class(details: Classified) -> PerClass:
    """Counts for every class, also for those without pictures."""
    classes = len(details.class_names)
    hit = details.best == details.labels[:, None]
    wrong = mistakes(details)
    mistaken_for, mistaken = np.full(classes, -1), np.zeros(classes, dtype=np.int64)
    true, first = np.unique(wrong.true, return_index=True)
    mistaken_for[true], mistaken[true] = wrong.predicted[first], wrong.count[first]

    def count(positions: np.ndarray) -> np.ndarray:
        return np.bincount(positions, minlength=classes)

    return PerClass(
        pictures=count(details.labels),
        right=count(details.labels[hit[:, 0]]),
        among_five=count(details.labels[hit.any(axis=1)]),
        predicted=count(details.best[:, 0]),
        mistaken_for=mistaken_for,
        mistaken=mistaken,
    )


def distinct_names(details: Classified) -> list[str]:
    """The classes' names; where several classes have one, each with its key, or its number from 0."""
    repeated = {name for name, times in Counter(details.class_names).items() if times > 1}
    pairs = enumerate(zip(details.class_names, details.keys, strict=True))
    return [
        f"{name} ({position if key in (None, name) else key})" if name in repeated else name
        for position, (name, key) in pairs
    ]


def as_csv(details: Classified) -> str:
    """The text of `eval/<task>.csv`."""
    counts, names = per_class(details), distinct_names(details)
    text = StringIO()
    writer = TextWriter(text)
    writer.writerow(COLUMNS)
    for position, name in enumerate(details.class_names):
        pictures, taken_for = int(counts.pictures[position]), int(counts.mistaken_for[position])
        of_pictures = [counts.right[position], counts.among_five[position]]
        top1, top5 = (f"{hits / pictures:.6g}" if pictures else "" for hits in of_pictures)
        top5 = top5 if len(names) > CERTAIN else ""
        mistaken = [names[taken_for], f"{counts.mistaken[position] / pictures:.6g}"] if taken_for >= 0 else ["", ""]
        writer.writerow(
            [details.keys[position] or "", name, pictures, top1, top5, *mistaken, counts.predicted[position]]
        )
    return text.getvalue()
