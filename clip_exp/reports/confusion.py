"""Which classes are taken for which, in forms that can be read: a matrix for a few, pairs, groups and a map for many."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from clip_exp.reports.per_class import Mistakes, PerClass
from clip_exp.reports.results import Classified

IN_A_MATRIX = 40  # classes whose whole matrix can be read
ON_A_MAP = 1000  # classes; of more, those with the most mistakes
IN_A_GROUP = 8
GROUPS = 6
ALIKE = 0.03  # share of a class's pictures that go to each other one of its group, on average


@dataclass(frozen=True)
class Matrix:
    """`cells[i][j]`: pictures of class `classes[i]` that were given `classes[j]`; `elsewhere[i]`: any other class."""

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


def groups(similarity_CC: np.ndarray, tree: np.ndarray, classes: np.ndarray) -> list[list[int]]:
    """Up to `GROUPS` sets of at most `IN_A_GROUP` classes that are taken for each other, the most alike first.

    They are the largest branches of the tree whose classes are alike, on average over the pairs in it.

    Args:
        similarity_CC, tree: see `similarity` and `cluster`.
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


def similarity(mistakes: Mistakes, pictures_C: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """[len(classes), len(classes)]: the share of one class's pictures that were given the other, both ways added, at most 1."""
    place = np.full(len(pictures_C), -1)
    place[classes] = np.arange(len(classes))
    known = (place[mistakes.true] >= 0) & (place[mistakes.predicted] >= 0)
    rows, columns = place[mistakes.true[known]], place[mistakes.predicted[known]]
    shares = np.zeros((len(classes), len(classes)))
    shares[rows, columns] = mistakes.count[known] / pictures_C[mistakes.true[known]]
    return np.minimum(shares + shares.T, 1.0)


def cluster(similarity_CC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The tree of average linkage by 1 - similarity (SciPy's form), and the order of its leaves: classes alike are neighbours."""
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    distance = 1 - similarity_CC
    np.fill_diagonal(distance, 0.0)
    tree = linkage(squareform(distance, checks=False), "average")
    return tree, leaves_list(tree)


def involved(counts: PerClass, mistakes: Mistakes) -> np.ndarray:
    """The classes for a map: those that have pictures or were given to some, at most `ON_A_MAP`, in their order."""
    classes = np.flatnonzero((counts.pictures > 0) | (counts.predicted > 0))
    if len(classes) <= ON_A_MAP:
        return classes
    total = np.bincount(mistakes.true, mistakes.count, len(counts.pictures))
    total += np.bincount(mistakes.predicted, mistakes.count, len(counts.pictures))
    return np.sort(classes[np.argsort(-total[classes], kind="stable")[:ON_A_MAP]])


def map_data(details: Classified, classes_ordered: np.ndarray, names: list[str]) -> dict[str, Any]:
    """What the page's script draws a map from: names, pictures of each class, and cells as flat [row, column, count, …]."""
    place = np.full(len(details.class_names), -1)
    place[classes_ordered] = np.arange(len(classes_ordered))
    rows, columns = place[details.labels], place[details.best[:, 0]]
    known = (rows >= 0) & (columns >= 0)
    size = len(classes_ordered)
    cells, count = np.unique(rows[known] * size + columns[known], return_counts=True)
    return {
        "names": [names[position] for position in classes_ordered],
        "pictures": np.bincount(rows[rows >= 0], minlength=size).tolist(),
        "cells": np.stack([cells // size, cells % size, count], axis=1).ravel().tolist(),
    }
