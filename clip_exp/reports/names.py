"""Names of metrics and of result files in `eval/`. Does not import torch.

Metrics are logged as `<task>/<metric>`, or `<task>/<set>/<metric>` for a robustness task. Only the part after the last slash identifies
the metric: the user chooses the name of the task, which may be `coco_ranking`.

Result files in `eval/` are named `digits` for the run's own weights, which are those of `run=DIR`, and `digits.step-000020` or
`digits.step-000020.ema` for others. So an evaluation with `ckpt` or `ema` never replaces results of the run's own weights.
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
CERTAIN = 5  # with so many classes or fewer, `top5` is always 1 and is left out
VALIDATION = ["loss", "top1", "top5", *RETRIEVAL]
RELIABLE_IMAGES = 10  # with fewer images, each changes recall by more than 10 points
SCALES = {
    **dict.fromkeys([*RECALLS, *CLASSIFICATION], Scale.fraction),
    **dict.fromkeys(RANKS, Scale.rank),
    "loss": Scale.loss,
}


def of_classification(classes: int) -> list[str]:
    """Return the names of the metrics of a classification.

    Args:
        classes: number of classes.
    """
    return [name for name in CLASSIFICATION if name != "top5" or classes > CERTAIN]


def few_images(count: int | None) -> str:
    """Return a note for the metrics of a validation on so few images that they say little, else an empty text.

    Args:
        count: number of validation images; None: no validation.
    """
    if count is None or count >= RELIABLE_IMAGES:
        return ""
    return f"only {count} validation image{'s' if count > 1 else ''}: recall is not reliable"


def scale_of(name: str) -> Scale:
    """Return the scale of a metric, whose name may have prefixes of a task and a set; unknown metrics are fractions."""
    metric = name.rpartition("/")[2]
    if metric in SCALES:
        return SCALES[metric]
    of_tasks = [scales[metric] for scales in (task.scales for task in TaskConfig.kinds().values()) if metric in scales]
    return of_tasks[0] if of_tasks else Scale.fraction


def better(name: str) -> str:
    """Return `max` if higher values of a metric are better, else `min`."""
    return "max" if scale_of(name) is Scale.fraction else "min"


OF_OTHERS = re.compile(r"\.([\w-]+-)?step-\d+(\.ema)?$", re.ASCII)


def name_in_run(task: str, source: ModelSource) -> str:
    """Return the name of the result files of a task in the run's `eval/`."""
    return task if source.run_dir is None or is_own(source) else name_of_weights(task, source.weights)


def name_of_weights(task: str, weights: Path) -> str:
    """Return a name of result files that includes the checkpoint and the kind of its weights.

    Args:
        task: name of the task.
        weights: weights file in the checkpoint folder.
    """
    return f"{task}.{weights.parent.name}" + (".ema" if weights.name == EMA_WEIGHTS else "")


def task_of(name: str) -> str:
    """Return the task from the name of its result files."""
    return OF_OTHERS.sub("", name)
