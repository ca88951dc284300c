"""The metrics of validation and of tasks: their names, and the scale that each is on. No torch.

A logged name is `<task>/<metric>`, in a robustness task `<task>/<set>/<metric>`. The part after the last slash is the metric. What stands
before it is chosen by the user and says nothing about the metric: a task may be called `coco_ranking`.
"""

from enum import StrEnum


class Scale(StrEnum):
    fraction = "fraction"  # 0 to 1, higher is better
    rank = "rank"  # from 1, lower is better
    loss = "loss"  # lower is better


RANKS = ["median_rank_i2t", "median_rank_t2i"]
RECALLS = [f"recall@{k}_{way}" for k in (1, 5, 10) for way in ("i2t", "t2i")]
RETRIEVAL = [*RANKS, *RECALLS]
CLASSIFICATION = ["top1", "top5", "mean_per_class_recall"]
CERTAIN = 5  # classes, or fewer: one of the best five is always right, so `top5` is not measured
VALIDATION = ["loss", "zeroshot_top1", "zeroshot_top5", *RETRIEVAL]

SCALES = {
    **dict.fromkeys([*RECALLS, *CLASSIFICATION, "zeroshot_top1", "zeroshot_top5"], Scale.fraction),
    **dict.fromkeys(RANKS, Scale.rank),
    "loss": Scale.loss,
}


def of_classification(classes: int) -> list[str]:
    """Return the metrics of a classification among so many classes."""
    return [name for name in CLASSIFICATION if name != "top5" or classes > CERTAIN]


def scale_of(name: str) -> Scale:
    """Return the scale of a metric, which may follow the names of a task and a set. Other files may hold other metrics: fractions."""
    return SCALES.get(name.rpartition("/")[2], Scale.fraction)


def better(name: str) -> str:
    """Return `min` or `max`: which values of a metric are better."""
    return "max" if scale_of(name) is Scale.fraction else "min"
