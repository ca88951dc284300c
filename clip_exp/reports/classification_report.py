"""Reports of a classification: per-class counts, the CSV file `eval/<task>.csv`, and the HTML report.

The HTML report has the metrics, the confusions, the accuracy of each class, and the most confident mistakes. Up to `IN_A_MATRIX`
classes are shown as a confusion matrix; more classes as pairs, groups and a map.

Columns of the CSV file, a row per class:
    key: folder or label of the class in the data; empty if the data do not have the class.
    name: class name in the prompts.
    images: number of evaluated images of the class.
    top1, top5: fraction of these images whose class is the top prediction, or among the top five; empty without images. top5 is
        also empty for five classes or fewer, where it would be 1 for any model.
    most_confused_with: most frequent wrong prediction for images of the class; empty without mistakes.
    fraction: fraction of the images of the class with that wrong prediction.
    predicted: number of images of any class whose top prediction is this class.
"""

from collections import Counter
from dataclasses import dataclass, field
from io import StringIO
from typing import Any

import numpy as np

from clip_exp.data.files import ImageLimits
from clip_exp.data.image_sets import ImageSet
from clip_exp.reports.evaluation import Result
from clip_exp.reports.html import Thumbnails, counted, fact_rows, percent, render
from clip_exp.reports.names import CERTAIN
from clip_exp.storage import TextWriter

COLUMNS = ("key", "name", "images", "top1", "top5", "most_confused_with", "fraction", "predicted")
MISTAKES_SHOWN = 16
CORRECT_SHOWN = 4
PAIRS_SHOWN = 60
ENDS_SHOWN = 10  # worst and best classes
ROWS_SHOWN = 2000  # of the table of classes; the CSV file has all of them
CONFIDENCE = 0.95
IN_A_MATRIX = 40  # classes; a larger confusion matrix is not readable
ON_A_MAP = 1000  # classes; if there are more, those with the most mistakes
IN_A_GROUP = 8
GROUPS = 6
ALIKE = 0.03  # least average similarity (see `similarity`) of the classes in a group


@dataclass(frozen=True)
class Classified:
    """Predictions for every image of a classification."""

    images: ImageSet
    kept: np.ndarray  # int64 [N], position in `images` of each row
    labels: np.ndarray  # int64 [N], position in `class_names`
    best: (
        np.ndarray
    )  # int64 [N, K], best class first; K is 5, or the number of classes if smaller; -1: no class got a vote
    probabilities: np.ndarray  # float32 [N, K], probabilities of `best` among all classes
    class_names: list[str]
    keys: list[str | None]  # folder or label of each class; None: not in the data
    limits: ImageLimits = field(default_factory=ImageLimits.evaluated)  # with which the images were read

    def report_files(self, result: Result, heading: dict[str, Any]) -> dict[str, str]:
        return {".csv": as_csv(self), ".html": classification_report(result, self, heading)}


@dataclass(frozen=True)
class PerClass:
    """Numbers of images per class, each int64 [C]."""

    images: np.ndarray
    top1: np.ndarray  # top prediction is correct
    top5: np.ndarray  # class is among the top five predictions
    predicted: np.ndarray  # images of any class whose top prediction is this class
    confused_with: np.ndarray  # most frequent wrong prediction, the first class on a tie; -1: none
    confused: np.ndarray  # images with that wrong prediction


@dataclass(frozen=True)
class Confusions:
    """Pairs of a true and a predicted class with their numbers of images, most frequent first; each int64 [P]."""

    true: np.ndarray
    predicted: np.ndarray
    count: np.ndarray


def per_class(details: Classified) -> PerClass:
    """Return the counts of every class, including classes without images."""
    classes = len(details.class_names)
    hit = details.best == details.labels[:, None]
    wrong = confusions(details)
    confused_with, confused = np.full(classes, -1), np.zeros(classes, dtype=np.int64)
    true, first = np.unique(wrong.true, return_index=True)
    confused_with[true], confused[true] = wrong.predicted[first], wrong.count[first]

    def count(positions: np.ndarray) -> np.ndarray:
        return np.bincount(positions, minlength=classes)

    return PerClass(
        images=count(details.labels),
        top1=count(details.labels[hit[:, 0]]),
        top5=count(details.labels[hit.any(axis=1)]),
        predicted=count(details.best[:, 0]),
        confused_with=confused_with,
        confused=confused,
    )


def confusions(details: Classified) -> Confusions:
    """Return all pairs of a true class and a wrong prediction; ties are in the order of the classes."""
    classes = len(details.class_names)
    predicted = details.best[:, 0]
    wrong = predicted != details.labels
    pairs, count = np.unique(details.labels[wrong] * classes + predicted[wrong], return_counts=True)
    order = np.argsort(-count, kind="stable")
    return Confusions(pairs[order] // classes, pairs[order] % classes, count[order])


def distinct_names(details: Classified) -> list[str]:
    """Return the class names; names of several classes get their key, or their number from 0, in parentheses."""
    repeated = {name for name, times in Counter(details.class_names).items() if times > 1}
    pairs = enumerate(zip(details.class_names, details.keys, strict=True))
    return [
        f"{name} ({position if key in (None, name) else key})" if name in repeated else name
        for position, (name, key) in pairs
    ]


def as_csv(details: Classified) -> str:
    """Return the text of `eval/<task>.csv`; the module docstring describes the columns."""
    counts, names = per_class(details), distinct_names(details)
    text = StringIO()
    writer = TextWriter(text)
    writer.writerow(COLUMNS)
    for position, name in enumerate(details.class_names):
        images, other = int(counts.images[position]), int(counts.confused_with[position])
        hits = [counts.top1[position], counts.top5[position]]
        top1, top5 = (f"{hit / images:.6g}" if images else "" for hit in hits)
        top5 = top5 if len(names) > CERTAIN else ""
        confused = [names[other], f"{counts.confused[position] / images:.6g}"] if other >= 0 else ["", ""]
        writer.writerow([details.keys[position] or "", name, images, top1, top5, *confused, counts.predicted[position]])
    return text.getvalue()


def classification_report(result: Result, details: Classified, heading: dict[str, Any]) -> str:
    """Return the HTML report of a classification."""
    from scipy.stats import binomtest  # takes half a second

    counts, wrong, names = per_class(details), confusions(details), distinct_names(details)
    metrics, protocol = result.metrics, result.protocol
    meanings = {
        "top1": ("Top-1 accuracy", "fraction of images whose top prediction is correct"),
        "top5": ("Top-5 accuracy", "fraction of images whose class is among the top five predictions"),
        "mean_per_class_recall": ("Mean per-class recall", "top-1 accuracy of each class, averaged over the classes"),
    }
    total, hits, classes = len(details.labels), int(counts.top1.sum()), len(names)
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
        lead=f"{hits:,} of {counted(total, 'image')} are classified correctly. "
        f"Chance level for {counted(classes, 'class', 'classes')} is {percent(1 / classes, 1 if classes <= 1000 else 3)}. "
        f"The {percent(CONFIDENCE, 0)} confidence interval of top-1 accuracy is {percent(interval.low)} to {percent(interval.high)}.",
        counts=[
            (total, "image" if total == 1 else "images"),
            (left_out, "left out"),
            *([(overlap, "also in the training set")] if overlap else []),
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


def _confusions(details: Classified, counts: PerClass, wrong: Confusions, names: list[str]) -> dict[str, Any]:
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
                "fraction": count / int(counts.images[true]),
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
        values["groups"] = [group for group in found if group.confusions > 1]
        values["map_data"] = map_data(details, classes[order], names)
    return values


@dataclass(frozen=True)
class Matrix:
    """Confusion matrix: `cells[i][j]` images of `classes[i]` are predicted as `classes[j]`, `elsewhere[i]` as any other class."""

    classes: list[int]
    cells: list[list[int]]
    elsewhere: list[int]
    confusions: int  # images of one of these classes that are predicted as another of them


def matrix(details: Classified, classes: list[int]) -> Matrix:
    """Return the confusion matrix of some classes."""
    place = np.full(len(details.class_names), len(classes))
    place[classes] = np.arange(len(classes))
    rows, columns = place[details.labels], place[details.best[:, 0]]
    counts = np.zeros((len(classes) + 1, len(classes) + 1), dtype=np.int64)
    np.add.at(counts, (rows, columns), 1)
    inside = counts[:-1, :-1]
    return Matrix(classes, inside.tolist(), counts[:-1, -1].tolist(), int(inside.sum() - np.trace(inside)))


def involved(counts: PerClass, wrong: Confusions) -> np.ndarray:
    """Return the classes of the map: those with images or predictions, at most `ON_A_MAP`, in their order."""
    classes = np.flatnonzero((counts.images > 0) | (counts.predicted > 0))
    if len(classes) <= ON_A_MAP:
        return classes
    total = np.bincount(wrong.true, wrong.count, len(counts.images))
    total += np.bincount(wrong.predicted, wrong.count, len(counts.images))
    return np.sort(classes[np.argsort(-total[classes], kind="stable")[:ON_A_MAP]])


def similarity(wrong: Confusions, images_C: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Return the similarity [len(classes), len(classes)] of classes: their confusion rates in both directions added, at most 1."""
    place = np.full(len(images_C), -1)
    place[classes] = np.arange(len(classes))
    known = (place[wrong.true] >= 0) & (place[wrong.predicted] >= 0)
    rows, columns = place[wrong.true[known]], place[wrong.predicted[known]]
    rates = np.zeros((len(classes), len(classes)))
    rates[rows, columns] = wrong.count[known] / images_C[wrong.true[known]]
    return np.minimum(rates + rates.T, 1.0)


def cluster(similarity_CC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return SciPy's average-linkage tree of 1 - similarity, and the order of its leaves, which places similar classes together."""
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    distance = 1 - similarity_CC
    np.fill_diagonal(distance, 0.0)
    tree = linkage(squareform(distance, checks=False), "average")
    return tree, leaves_list(tree)


def groups(similarity_CC: np.ndarray, tree: np.ndarray, classes: np.ndarray) -> list[list[int]]:
    """Return up to `GROUPS` groups of at most `IN_A_GROUP` classes that are confused with each other, most similar first.

    A group is a largest branch of the tree whose classes have an average similarity of at least `ALIKE`.

    Args:
        similarity_CC: similarity of the classes.
        tree: average-linkage tree of the classes.
        classes: class of each row of `similarity_CC`.
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
    """Return the confusion map for `report.js`: names, images per class, and flat cells [row, column, count, …]."""
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
    top1, many_first = counts.top1[scored] / counts.images[scored], -counts.images[scored]
    worst, best = scored[np.lexsort((many_first, top1))], scored[np.lexsort((many_first, -top1))]
    listed = np.arange(len(names)) if len(names) <= ROWS_SHOWN else np.sort(worst[:ROWS_SHOWN])
    ends = ENDS_SHOWN if len(names) > IN_A_MATRIX else 0

    def row(position: int) -> dict[str, Any]:
        key, name, images = details.keys[position], names[position], int(counts.images[position])
        is_informative = key is not None and key.replace("_", " ") != details.class_names[position] and key not in name
        other = counts.confused_with[position]
        of = max(1, images)
        return {
            "name": name,
            "key": key if is_informative else None,
            "images": images,
            "predicted": int(counts.predicted[position]),
            "top1": float(counts.top1[position] / of),
            "top5": float(counts.top5[position] / of),
            "confused_with": names[other] if other >= 0 else None,
            "fraction": float(counts.confused[position] / of),
        }

    shown = {"rows": listed, "worst": worst[:ends], "best": best[:ends]}
    return {"listed": len(listed)} | {part: [row(at) for at in rows.tolist()] for part, rows in shown.items()}


def _examples(details: Classified, names: list[str]) -> dict[str, Any]:
    thumbnails = Thumbnails(details.images, details.limits)
    confidence, correct = details.probabilities[:, 0], details.best[:, 0] == details.labels
    second = details.probabilities[:, 1] if details.probabilities.shape[1] > 1 else confidence
    # The second probability breaks ties: many of the first are 1 in float32.
    by_confidence = np.lexsort((second, -confidence))
    of_correct = by_confidence[correct[by_confidence]]
    _, first = np.unique(details.labels[of_correct], return_index=True)  # one per class

    def example(row: int) -> dict[str, Any]:
        label = int(details.labels[row])
        ranked = zip(details.best[row].tolist(), details.probabilities[row].tolist(), strict=True)
        predictions = [
            {"name": names[position], "probability": probability, "correct": position == label}
            for position, probability in ranked
            if position >= 0  # -1: no class got a vote
        ]
        return {
            "thumbnail": thumbnails[int(details.kept[row])],
            "true": names[label],
            "predictions": predictions,
            "among_shown": any(prediction["correct"] for prediction in predictions),
        }

    return {
        "mistakes": [example(row) for row in by_confidence[~correct[by_confidence]][:MISTAKES_SHOWN]],
        "correct": [example(row) for row in of_correct[np.sort(first)[:CORRECT_SHOWN]]],
    }
