"""Names of results in a run's `eval/`: `digits` for the run's own weights, `digits.step-000020` or `digits.step-000020.ema` for others.

A run's own weights are those that `run=DIR` names. So an evaluation of others, with `ckpt` or `ema`, never replaces the results of these.
"""

import re
from pathlib import Path

from clip_exp.checkpoints.writer import EMA_WEIGHTS
from clip_exp.loading.source import ModelSource, is_own

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
