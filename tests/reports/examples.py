"""Results of evaluation tasks, with noise images in files."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from clip_exp.data.image_sets import ImageFiles
from clip_exp.evaluation.classification import accuracies
from clip_exp.reports.classification_report import Classified
from clip_exp.reports.comparison_report import Compared
from clip_exp.reports.evaluation import Result
from clip_exp.reports.retrieval_report import Query, Retrieved
from tests.small_runs import write_image

ATTACK = "\"'><script>document.title = 'owned'</script><img src=x onerror=\"document.title='owned'\">{{ 7 * 7 }}"
HEADING: dict[str, Any] = {
    "title": "pets",
    "kind": "Zero-shot classification",
    "about": ["vit_nano"],
    "made_by": "",
    "command": None,
}


def noise_files(folder: Path, count: int, size: tuple[int, int] = (40, 36)) -> ImageFiles:
    return ImageFiles([write_image(folder / f"{number}.png", number, size) for number in range(count)])


def classified(images: ImageFiles, classes: int, rows: int, seed: int = 0, right: float = 0.6) -> Classified:
    """Return predictions whose first class is correct with probability `right`, else the next class."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, rows)
    order = np.stack([rng.permutation(classes)[: min(5, classes)] for _ in range(rows)])
    first = np.where(rng.random(rows) < right, labels, (labels + 1) % classes)
    for row, choice in zip(order, first, strict=True):
        row[np.flatnonzero(row == choice)] = row[0]
        row[0] = choice
    probabilities = -np.sort(-rng.dirichlet(np.ones(order.shape[1]), rows), axis=1).astype(np.float32)
    names = [f"class {number}" for number in range(classes)]
    return Classified(
        images, rng.integers(0, len(images), rows), labels, order, probabilities, names, [f"k{n}" for n in names]
    )


def classification_result(details: Classified, **protocol: Any) -> Result:
    labels, best = torch.from_numpy(details.labels), torch.from_numpy(details.best)
    about = {
        "kind": "zero_shot",
        "data": "/data/pets",
        "images": len(labels),
        "bad_images": 0,
        "classes": len(details.class_names),
        "weights_sha256": "0123456789abcdef" * 4,
        "preprocessing": {"resize": "shorter side 32", "mean": [0.5, 0.5, 0.5]},
        **protocol,
    }
    return Result(accuracies(best, labels, len(details.class_names)), about, details)


def retrieved(images: ImageFiles, captions: list[str]) -> Retrieved:
    """Return queries in which caption i belongs to image i and has rank i + 1."""
    count = len(images)

    def query(number: int) -> Query:
        others = [other for other in range(count) if other != number]
        order = [*others[:number], number, *others[number:]][:8]
        scores = [0.4 - 0.01 * place for place in range(len(order))]
        return Query(number, order, scores, [other == number for other in order], number + 1)

    queries = [query(number) for number in range(count)]
    return Retrieved(images, captions, queries, queries)


def retrieval_result(details: Retrieved) -> Result:
    metrics = {f"recall@{k}_{way}": 0.1 * k for k in (1, 5, 10) for way in ("i2t", "t2i")}
    medians = {"median_rank_i2t": 3.0, "median_rank_t2i": 4.0}
    protocol = {"kind": "retrieval", "data": "pairs.csv", "images": len(details.images), "bad_images": 0}
    return Result({**metrics, **medians}, protocol, details)


def compared_result() -> Result:
    sets = ["imagenet", "imagenet_v2", "imagenet_a"]
    top1: dict[str, list[float | None]] = {"ours": [0.762, 0.701, 0.771], "resnet101": [0.762, 0.643, 0.027]}
    protocol = {"kind": "robustness", "images": 30, "bad_images": 0, "mean_of": sets[1:]}
    return Result({"imagenet/top1": 0.762}, protocol, Compared(sets, top1))
