"""What an evaluation leaves of a classification: the counts of each class, `eval/<task>.csv` with a row for each, and the page.

The page has its numbers, which classes are taken for which, each class, and the most confident mistakes. Confusions come in forms that can be
read: a matrix for a few classes; pairs, groups and a map for many.

Columns of the file, in the order of the classes:
    key: the folder or label of the class in the data; empty where the data lack it.
    name: what it was scored as.
    images: how many of them were scored.
    top1, top5: share of these whose first choice, or one of whose first five choices, is right; empty without images, top5 also
        of five classes or fewer, where it would be 1 for any model.
    most_often_taken_for: the class that its wrong images were given most often; empty without mistakes.
    share: of its images that were given that class.
    predicted: images of any class whose first choice it is.
"""

from collections import Counter
from dataclasses import dataclass
from io import StringIO
from typing import Any

import numpy as np

from clip_exp.data.image_sets import ImageSet
from clip_exp.reports.evaluation import Result
from clip_exp.reports.html import Thumbnails, counted, fact_rows, percent, render
from clip_exp.reports.names import CERTAIN
from clip_exp.storage import TextWriter

COLUMNS = ("key", "name", "images", "top1", "top5", "most_often_taken_for", "share", "predicted")
WRONG_SHOWN = 16
RIGHT_SHOWN = 4
PAIRS_SHOWN = 60
ENDS_SHOWN = 10  # worst and best classes
ROWS_SHOWN = 2000  # of the table of classes; the file beside the page has all
CONFIDENCE = 0.95
IN_A_MATRIX = 40  # classes whose whole matrix can be read
ON_A_MAP = 1000  # classes; of more, those with the most mistakes
IN_A_GROUP = 8
GROUPS = 6
ALIKE = 0.03  # share of a class's images that go to each other one of its group, on average


@dataclass(frozen=True)
class Classified:
    """Every image of a classification, with its best classes."""

    images: ImageSet
    kept: np.ndarray  # int64 [N], which of `images` the rows are
    labels: np.ndarray  # int64 [N], position in `class_names`
    best: np.ndarray  # int64 [N, K], best first; K = 5, or all classes if they are fewer; -1 where no class got a vote
    probabilities: np.ndarray  # float32 [N, K], of `best`, among all classes
    class_names: list[str]
    keys: list[str | None]  # folder or label of each class; None: the data lacks it

    def report_files(self, result: Result, heading: dict[str, Any]) -> dict[str, str]:
        return {".csv": as_csv(self), ".html": classification_report(result, self, heading)}


@dataclass(frozen=True)
class PerClass:
    """Counts of images, each int64 [C]."""

    images: np.ndarray
    right: np.ndarray  # first choice
    among_five: np.ndarray
    predicted: np.ndarray  # of any class, first choice
    mistaken_for: np.ndarray  # the most frequent wrong first choice, of equals the first class; -1: none
    mistaken: np.ndarray  # how often


@dataclass(frozen=True)
class Mistakes:
    """How often images of one class were given another, the most frequent first; each int64 [P]."""

    true: np.ndarray
    predicted: np.ndarray
    count: np.ndarray


def per_class(details: Classified) -> PerClass:
    """Counts for every class, also for those without images."""
    classes = len(details.class_names)
    hit = details.best == details.labels[:, None]
    wrong = mistakes(details)
    mistaken_for, mistaken = np.full(classes, -1), np.zeros(classes, dtype=np.int64)
    true, first = np.unique(wrong.true, return_index=True)
    mistaken_for[true], mistaken[true] = wrong.predicted[first], wrong.count[first]

    def count(positions: np.ndarray) -> np.ndarray:
        return np.bincount(positions, minlength=classes)

    return PerClass(
        images=count(details.labels),
        right=count(details.labels[hit[:, 0]]),
        among_five=count(details.labels[hit.any(axis=1)]),
        predicted=count(details.best[:, 0]),
        mistaken_for=mistaken_for,
        mistaken=mistaken,
    )


def mistakes(details: Classified) -> Mistakes:
    """All pairs of a class and another that its images were given; of equally frequent ones the first classes."""
    classes = len(details.class_names)
    predicted = details.best[:, 0]
    wrong = predicted != details.labels
    pairs, count = np.unique(details.labels[wrong] * classes + predicted[wrong], return_counts=True)
    order = np.argsort(-count, kind="stable")
    return Mistakes(pairs[order] // classes, pairs[order] % classes, count[order])


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
        images, taken_for = int(counts.images[position]), int(counts.mistaken_for[position])
        of_images = [counts.right[position], counts.among_five[position]]
        top1, top5 = (f"{hits / images:.6g}" if images else "" for hits in of_images)
        top5 = top5 if len(names) > CERTAIN else ""
        mistaken = [names[taken_for], f"{counts.mistaken[position] / images:.6g}"] if taken_for >= 0 else ["", ""]
        writer.writerow([details.keys[position] or "", name, images, top1, top5, *mistaken, counts.predicted[position]])
    return text.getvalue()


def classification_report(result: Result, details: Classified, heading: dict[str, Any]) -> str:
    """The HTML of a classification's page."""
    from scipy.stats import binomtest  # takes half a second

    counts, wrong, names = per_class(details), mistakes(details), distinct_names(details)
    metrics, protocol = result.metrics, result.protocol
    meanings = {
        "top1": ("Top-1", "of the images: the first choice is right"),
        "top5": ("Top-5", "of the images: the right class is among the first five choices"),
        "mean_per_class_recall": (
            "Mean per class recall",
            "top-1 within each class, averaged: all classes count the same",
        ),
    }
    total, hits, classes = len(details.labels), int(counts.right.sum()), len(names)
    interval = binomtest(hits, total).proportion_ci(CONFIDENCE, "wilson")
    left_out = protocol.get("bad_images", 0) + protocol.get("unlabeled_images", 0)
    overlap = (protocol.get("overlap") or {"images": 0})["images"]
    empty = int((counts.images == 0).sum())
    return render(
        "classification.html",
        **heading,
        tiles=[
            {"name": name, "value": percent(metrics[key]), "meaning": meaning}
            for key, (name, meaning) in meanings.items()
            if key in metrics
        ],
        lead=f"The first of {classes:,} choices is right for {hits:,} of {counted(total, 'image')}. "
        f"Guessing would be right for {percent(1 / classes, 1 if classes <= 1000 else 3)} of them. With {'so few' if total < 1000 else 'this many'} "
        f"images, the {percent(CONFIDENCE, 0)} confidence interval of top-1 reaches from {percent(interval.low)} to {percent(interval.high)}.",
        counts=[
            (total, "image" if total == 1 else "images"),
            (left_out, "left out"),
            *([(overlap, "in the training images too")] if overlap else []),
            (classes, "class" if classes == 1 else "classes"),
            (empty, "class without images" if empty == 1 else "classes without images"),
        ],
        names=names,
        images=counts.images.tolist(),
        classes=classes,
        show_top5="top5" in metrics,
        protocol=fact_rows(protocol),
        **_confusions(details, counts, wrong, names),
        **_classes(details, counts, names),
        **_examples(details, names),
    )


def _confusions(details: Classified, counts: PerClass, wrong: Mistakes, names: list[str]) -> dict[str, Any]:
    pairs = zip(
        wrong.true[:PAIRS_SHOWN], wrong.predicted[:PAIRS_SHOWN], wrong.count[:PAIRS_SHOWN].tolist(), strict=True
    )
    values: dict[str, Any] = {
        "pairs": [
            {
                "true": names[true],
                "predicted": names[predicted],
                "count": count,
                "of": int(counts.images[true]),
                "share": count / int(counts.images[true]),
            }
            for true, predicted, count in pairs
        ],
        "more_pairs": max(0, len(wrong.count) - PAIRS_SHOWN),
        "matrix": None,
        "groups": [],
        "map_data": None,
    }
    if len(names) <= IN_A_MATRIX:
        values["matrix"] = matrix(details, list(range(len(names))))
    elif values["pairs"]:
        classes = involved(counts, wrong)
        alike = similarity(wrong, counts.images, classes)
        tree, order = cluster(alike)
        found = [matrix(details, group) for group in groups(alike, tree, classes)]
        values["groups"] = [group for group in found if group.mistakes > 1]
        values["map_data"] = map_data(details, classes[order], names)
    return values


@dataclass(frozen=True)
class Matrix:
    """`cells[i][j]`: images of class `classes[i]` that were given `classes[j]`; `elsewhere[i]`: any other class."""

    classes: list[int]
    cells: list[list[int]]
    elsewhere: list[int]
    mistakes: int  # between these classes


def matrix(details: Classified, classes: list[int]) -> Matrix:
    """The confusion matrix of some classes."""
    place = np.full(len(details.class_names), len(classes))
    place[classes] = np.arange(len(classes))
    rows, columns = place[details.labels], place[details.best[:, 0]]
    counts = np.zeros((len(classes) + 1, len(classes) + 1), dtype=np.int64)
    np.add.at(counts, (rows, columns), 1)
    inside = counts[:-1, :-1]
    return Matrix(classes, inside.tolist(), counts[:-1, -1].tolist(), int(inside.sum() - np.trace(inside)))


def involved(counts: PerClass, wrong: Mistakes) -> np.ndarray:
    """The classes for a map: those that have images or were given to some, at most `ON_A_MAP`, in their order."""
    classes = np.flatnonzero((counts.images > 0) | (counts.predicted > 0))
    if len(classes) <= ON_A_MAP:
        return classes
    total = np.bincount(wrong.true, wrong.count, len(counts.images))
    total += np.bincount(wrong.predicted, wrong.count, len(counts.images))
    return np.sort(classes[np.argsort(-total[classes], kind="stable")[:ON_A_MAP]])


def similarity(wrong: Mistakes, images_C: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """[len(classes), len(classes)]: the share of one class's images that were given the other, both ways added, at most 1."""
    place = np.full(len(images_C), -1)
    place[classes] = np.arange(len(classes))
    known = (place[wrong.true] >= 0) & (place[wrong.predicted] >= 0)
    rows, columns = place[wrong.true[known]], place[wrong.predicted[known]]
    shares = np.zeros((len(classes), len(classes)))
    shares[rows, columns] = wrong.count[known] / images_C[wrong.true[known]]
    return np.minimum(shares + shares.T, 1.0)


def cluster(similarity_CC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The tree of average linkage by 1 - similarity (SciPy's form), and the order of its leaves: classes alike are neighbours."""
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    distance = 1 - similarity_CC
    np.fill_diagonal(distance, 0.0)
    tree = linkage(squareform(distance, checks=False), "average")
    return tree, leaves_list(tree)


def groups(similarity_CC: np.ndarray, tree: np.ndarray, classes: np.ndarray) -> list[list[int]]:
    """Up to `GROUPS` sets of at most `IN_A_GROUP` classes that are taken for each other, the most alike first.

    They are the largest branches of the tree whose classes are alike, on average over the pairs in it.

    Args:
        classes: the class of each row.
    """
    members: list[list[int]] = [[row] for row in range(len(classes))]
    found: dict[int, list[int]] = {}
    for left, right, distance, size in tree:
        merged = members[int(left)] + members[int(right)]
        members.append(merged)
        if size <= IN_A_GROUP and 1 - distance >= ALIKE:
            for part in (int(left), int(right)):
                found.pop(part, None)
            found[len(members) - 1] = merged
    weight = {node: similarity_CC[np.ix_(rows, rows)].sum() for node, rows in found.items()}
    best = sorted(found, key=lambda node: -weight[node])[:GROUPS]
    return [sorted(int(classes[row]) for row in found[node]) for node in best]


def map_data(details: Classified, classes_ordered: np.ndarray, names: list[str]) -> dict[str, Any]:
    """What the page's script draws a map from: names, images of each class, and cells as flat [row, column, count, …]."""
    place = np.full(len(details.class_names), -1)
    place[classes_ordered] = np.arange(len(classes_ordered))
    rows, columns = place[details.labels], place[details.best[:, 0]]
    known = (rows >= 0) & (columns >= 0)
    size = len(classes_ordered)
    cells, count = np.unique(rows[known] * size + columns[known], return_counts=True)
    return {
        "names": [names[position] for position in classes_ordered],
        "images": np.bincount(rows[rows >= 0], minlength=size).tolist(),
        "cells": np.stack([cells // size, cells % size, count], axis=1).ravel().tolist(),
    }


def _classes(details: Classified, counts: PerClass, names: list[str]) -> dict[str, Any]:
    scored = np.flatnonzero(counts.images > 0)
    top1, many_first = counts.right[scored] / counts.images[scored], -counts.images[scored]
    worst, best = scored[np.lexsort((many_first, top1))], scored[np.lexsort((many_first, -top1))]
    listed = np.arange(len(names)) if len(names) <= ROWS_SHOWN else np.sort(worst[:ROWS_SHOWN])
    ends = ENDS_SHOWN if len(names) > IN_A_MATRIX else 0

    def row(position: int) -> dict[str, Any]:
        key, name, images = details.keys[position], names[position], int(counts.images[position])
        tells_more = key is not None and key.replace("_", " ") != details.class_names[position] and key not in name
        taken_for = counts.mistaken_for[position]
        of = max(1, images)
        return {
            "name": name,
            "key": key if tells_more else None,
            "images": images,
            "predicted": int(counts.predicted[position]),
            "top1": float(counts.right[position] / of),
            "top5": float(counts.among_five[position] / of),
            "mistaken_for": names[taken_for] if taken_for >= 0 else None,
            "share": float(counts.mistaken[position] / of),
        }

    shown = {"rows": listed, "worst": worst[:ends], "best": best[:ends]}
    return {"listed": len(listed)} | {part: [row(at) for at in rows.tolist()] for part, rows in shown.items()}


def _examples(details: Classified, names: list[str]) -> dict[str, Any]:
    thumbnails = Thumbnails(details.images)
    confidence, right = details.probabilities[:, 0], details.best[:, 0] == details.labels
    second = details.probabilities[:, 1] if details.probabilities.shape[1] > 1 else confidence
    surest = np.lexsort((second, -confidence))  # the second, since many of the first are 1 in float32
    of_right = surest[right[surest]]
    _, first = np.unique(details.labels[of_right], return_index=True)  # one per class

    def example(row: int) -> dict[str, Any]:
        label = int(details.labels[row])
        ranked = zip(details.best[row].tolist(), details.probabilities[row].tolist(), strict=True)
        choices = [
            {"name": names[position], "probability": probability, "right": position == label}
            for position, probability in ranked
            if position >= 0  # -1: no further class was in question
        ]
        return {
            "thumbnail": thumbnails[int(details.kept[row])],
            "true": names[label],
            "choices": choices,
            "among_shown": any(choice["right"] for choice in choices),
        }

    return {
        "wrong_examples": [example(row) for row in surest[~right[surest]][:WRONG_SHOWN]],
        "right_examples": [example(row) for row in of_right[np.sort(first)[:RIGHT_SHOWN]]],
    }
