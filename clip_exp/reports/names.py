"""Names in a run's results, of metrics and of the files in `eval/`. No torch.

A metric's logged name is `<task>/<metric>`, in a robustness task `<task>/<set>/<metric>`. The part after the last slash is the metric. What stands
before it is chosen by the user and says nothing about the metric: a task may be called `coco_ranking`.

A result in `eval/` is `digits` for the run's own weights, `digits.step-000020` or `digits.step-000020.ema` for others. A run's own weights
are those that `run=DIR` names. So an evaluation of others, with `ckpt` or `ema`, never replaces the results of these.
"""

import re
from pathlib import Path

from clip_exp.checkpoints.folders import EMA_WEIGHTS
from clip_exp.config.evaluation import Scale, TaskConfig
from clip_exp.loading import ModelSource, is_own

RANKS = ["median_rank_i2t", "median_rank_t2i"]
RECALLS = [f"recall@{k}_{way}" for k in (1, 5, 10) for way in ("i2t", "t2i")]
RETRIEVAL = [*RANKS, *RECALLS]
CLASSIFICATION = ["top1", "top5", "mean_per_class_recall"]
CERTAIN = 5  # classes, or fewer: one of the best five is always right, so `top5` is not measured
VALIDATION = ["loss", "top1", "top5", *RETRIEVAL]
SCALES = {
    **dict.fromkeys([*RECALLS, *CLASSIFICATION], Scale.fraction),
    **dict.fromkeys(RANKS, Scale.rank),
    "loss": Scale.loss,
}


def of_classification(classes: int) -> list[str]:
    """Return the metrics of a classification among so many classes."""
    return [name for name in CLASSIFICATION if name != "top5" or classes > CERTAIN]


def scale_of(name: str) -> Scale:
    """Return the scale of a metric, which may follow the names of a task and a set. Other files may hold other metrics: fractions."""
    metric = name.rpartition("/")[2]
    if metric in SCALES:
        return SCALES[metric]
    of_tasks = [scales[metric] for scales in (task.scales for task in TaskConfig.kinds().values()) if metric in scales]
    return of_tasks[0] if of_tasks else Scale.fraction


def better(name: str) -> str:
    """Return `min` or `max`: which values of a metric are better."""
    return "max" if scale_of(name) is Scale.fraction else "min"


OF_OTHERS = re.compile(r"\.([\w-]+-)?step-\d+(\.ema)?$", re.ASCII)


def name_in_run(task: str, source: ModelSource) -> str:
    """Return the name of the result of a task, as its files in the run's `eval/` have it."""
    return task if source.run_dir is None or is_own(source) else name_of_weights(task, source.weights)


def name_of_weights(task: str, weights: Path) -> str:
    """Return a name that tells the checkpoint and the kind of its weights.

    Args:
        weights: the file in the checkpoint's folder.
    """
    return f"{task}.{weights.parent.name}" + (".ema" if weights.name == EMA_WEIGHTS else "")


def task_of(name: str) -> str:
    """Return the task that a result's name begins with."""
    return OF_OTHERS.sub("", name)
