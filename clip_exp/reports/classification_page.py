"""The page of a classification: its numbers, what is taken for what, each class, the most confident mistakes."""

from typing import Any

import numpy as np

from clip_exp.reports.confusion import IN_A_MATRIX, cluster, groups, involved, map_data, matrix, similarity
from clip_exp.reports.page import counted, fact_rows, percent, render
from clip_exp.reports.per_class import Mistakes, PerClass, distinct_names, mistakes, per_class
from clip_exp.reports.results import Classified, Result
from clip_exp.reports.thumbnails import Thumbnails

WRONG_SHOWN = 16
RIGHT_SHOWN = 4
PAIRS_SHOWN = 60
ENDS_SHOWN = 10  # worst and best classes
ROWS_SHOWN = 2000  # of the table of classes; the file beside the page has all
CONFIDENCE = 0.95


def classification_page(result: Result, details: Classified, heading: dict[str, Any]) -> str:
    """The HTML of a classification's page.

    Args:
        heading: `origin.heading`.
    """
    counts, wrong, names = per_class(details), mistakes(details), distinct_names(details)
    values = {
        "tiles": _tiles(result.metrics),
        "lead": _lead(details, len(names)),
        "counts": _counts(result.protocol, details, counts),
        "names": names,
        "pictures": counts.pictures.tolist(),
        "classes": len(names),
        "show_top5": "top5" in result.metrics,
        "protocol": fact_rows(result.protocol),
        **_confusions(details, counts, wrong, names),
        **_classes(details, counts, names),
        **_examples(details, names),
    }
    return render("classification.html", **heading, **values)


def _tiles(metrics: dict[str, float]) -> list[dict[str, str]]:
    meanings = {
        "top1": ("Top-1", "of the pictures: the first choice is right"),
        "top5": ("Top-5", "of the pictures: the right class is among the first five choices"),
        "mean_per_class_recall": (
            "Mean per class recall",
            "top-1 within each class, averaged: all classes count the same",
        ),
    }
    shown = [key for key in meanings if key in metrics]
    return [{"name": meanings[key][0], "value": percent(metrics[key]), "meaning": meanings[key][1]} for key in shown]


def _lead(details: Classified, classes: int) -> str:
    from scipy.stats import binomtest  # takes half a second

    total = len(details.labels)
    hits = int((details.best[:, 0] == details.labels).sum())
    interval = binomtest(hits, total).proportion_ci(CONFIDENCE, "wilson")
    return (
        f"The first of {classes:,} choices is right for {hits:,} of {counted(total, 'picture')}. "
        f"Guessing would be right for {percent(1 / classes, 1 if classes <= 1000 else 3)} of them. With {'so few' if total < 1000 else 'this many'} "
        f"pictures, the {percent(CONFIDENCE, 0)} confidence interval of top-1 reaches from {percent(interval.low)} to {percent(interval.high)}."
    )


def _counts(protocol: dict[str, Any], details: Classified, counts: PerClass) -> list[tuple[int, str]]:
    left_out = protocol.get("bad_pictures", 0) + protocol.get("unlabeled_pictures", 0)
    overlap = (protocol.get("overlap") or {"images": 0})["images"]
    pictures, classes = len(details.labels), len(details.class_names)
    empty = int((counts.pictures == 0).sum())
    return [
        (pictures, "picture" if pictures == 1 else "pictures"),
        (left_out, "left out"),
        *([(overlap, "in the training images too")] if overlap else []),
        (classes, "class" if classes == 1 else "classes"),
        (empty, "class without pictures" if empty == 1 else "classes without pictures"),
    ]


def _confusions(details: Classified, counts: PerClass, wrong: Mistakes, names: list[str]) -> dict[str, Any]:
    values: dict[str, Any] = {
        "pairs": [_pair(place, counts, wrong, names) for place in range(min(PAIRS_SHOWN, len(wrong.count)))],
        "more_pairs": max(0, len(wrong.count) - PAIRS_SHOWN),
        "matrix": None,
        "groups": [],
        "map_data": None,
    }
    if len(names) <= IN_A_MATRIX:
        return {**values, "matrix": matrix(details, list(range(len(names))))}
    if not values["pairs"]:
        return values
    classes = involved(counts, wrong)
    alike = similarity(wrong, counts.pictures, classes)
    tree, order = cluster(alike)
    found = [matrix(details, group) for group in groups(alike, tree, classes)]
    return {
        **values,
        "groups": [group for group in found if group.mistakes > 1],
        "map_data": map_data(details, classes[order], names),
    }


def _pair(place: int, counts: PerClass, wrong: Mistakes, names: list[str]) -> dict[str, Any]:
    true, count = wrong.true[place], int(wrong.count[place])
    of = int(counts.pictures[true])
    return {
        "true": names[true],
        "predicted": names[wrong.predicted[place]],
        "count": count,
        "of": of,
        "share": count / of,
    }


def _classes(details: Classified, counts: PerClass, names: list[str]) -> dict[str, Any]:
    scored = np.flatnonzero(counts.pictures > 0)
    top1, many_first = counts.right[scored] / counts.pictures[scored], -counts.pictures[scored]
    worst, best = scored[np.lexsort((many_first, top1))], scored[np.lexsort((many_first, -top1))]
    listed = np.arange(len(names)) if len(names) <= ROWS_SHOWN else np.sort(worst[:ROWS_SHOWN])
    ends = ENDS_SHOWN if len(names) > IN_A_MATRIX else 0

    def rows(positions: np.ndarray) -> list[dict[str, Any]]:
        return [_class_row(int(position), details, counts, names) for position in positions]

    return {"rows": rows(listed), "listed": len(listed), "worst": rows(worst[:ends]), "best": rows(best[:ends])}


def _class_row(position: int, details: Classified, counts: PerClass, names: list[str]) -> dict[str, Any]:
    key, name, pictures = details.keys[position], names[position], int(counts.pictures[position])
    tells_more = key is not None and key.replace("_", " ") != details.class_names[position] and key not in name
    taken_for = counts.mistaken_for[position]
    of = max(1, pictures)
    return {
        "name": name,
        "key": key if tells_more else None,
        "pictures": pictures,
        "predicted": int(counts.predicted[position]),
        "top1": float(counts.right[position] / of),
        "top5": float(counts.among_five[position] / of),
        "mistaken_for": names[taken_for] if taken_for >= 0 else None,
        "share": float(counts.mistaken[position] / of),
    }


def _examples(details: Classified, names: list[str]) -> dict[str, Any]:
    thumbnails = Thumbnails(details.pictures)
    confidence, right = details.probabilities[:, 0], details.best[:, 0] == details.labels
    second = details.probabilities[:, 1] if details.probabilities.shape[1] > 1 else confidence
    surest = np.lexsort((second, -confidence))  # the second, since many of the first are 1 in float32
    of_right = surest[right[surest]]
    _, first = np.unique(details.labels[of_right], return_index=True)  # one per class
    shown = {
        "wrong_examples": surest[~right[surest]][:WRONG_SHOWN],
        "right_examples": of_right[np.sort(first)[:RIGHT_SHOWN]],
    }
    return {kind: [_example(int(row), details, names, thumbnails) for row in rows] for kind, rows in shown.items()}


def _example(row: int, details: Classified, names: list[str], thumbnails: Thumbnails) -> dict[str, Any]:
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
