"""Early stopping: which changes of the monitored metric count as an improvement."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import EarlyStopping

from clip_exp.checkpoints.io import SafeCheckpointIO
from clip_exp.training.fit import _build_callbacks
from clip_exp.training.preflight import training_tasks
from clip_exp.training.tasks import TaskPatience
from tests.compose import train_config

STUCK = [2.0794, 2.0793, 2.0792, 2.0791]
SLOW = [2.0794, 2.0790, 2.0783, 2.0780, 2.0772]  # each second value is better by more than 0.001
OF_TASK = ("task=digits", "task_every_n_steps=1", "monitor=digits/top1")


def early_stopping(folder: Path, *overrides: str) -> EarlyStopping:
    """Return the callback of a run that stops early."""
    config = train_config("data=shapes", "patience=2", *overrides)
    data: Any = SimpleNamespace(num_rows=100, val_images=None, images_of_step=list)
    callbacks = _build_callbacks(config, folder, SafeCheckpointIO(), 100, data, training_tasks(config))
    (found,) = (callback for callback in callbacks if isinstance(callback, EarlyStopping))
    return found


def measurements(callback: EarlyStopping, values: list[float]) -> int | None:
    """Return the number of measurements after which the run ends; None if it does not."""
    for number, value in enumerate(values, 1):
        if callback._evaluate_stopping_criteria(torch.tensor(value))[0]:
            return number
    return None


@pytest.mark.parametrize(
    ("overrides", "values", "end"),
    [
        pytest.param(("monitor=val/loss",), STUCK, 3, id="a loss that falls by 1e-4"),
        pytest.param(("monitor=val/loss",), SLOW, None, id="a slow fall adds up"),
        pytest.param(("monitor=val/loss", "min_delta=0"), STUCK, None, id="any improvement"),
        pytest.param(("monitor=val/loss", "min_delta=0.1"), [2.0, 1.95, 1.85, 1.8, 1.77], 5, id="large improvements"),
        pytest.param(("monitor=val/recall@1_i2t",), [0.25, 0.2504, 0.2508], 3, id="a recall of 0.04 points more"),
        pytest.param(("monitor=val/recall@1_i2t",), [0.25, 0.252, 0.254], None, id="a recall of 0.2 points more"),
        pytest.param(("monitor=val/median_rank_i2t",), [9.0, 8.5, 8.0], None, id="a better rank"),
        pytest.param(OF_TASK, [0.5, 0.5004, 0.5008], 3, id="a metric of a task"),
        pytest.param((*OF_TASK, "min_delta=0"), [0.5, 0.5004, 0.5008], None, id="any improvement of a task's metric"),
    ],
)
def test_patience_counts_a_change_of_at_most_min_delta_as_no_improvement(
    overrides: tuple[str, ...], values: list[float], end: int | None, tmp_path: Path
) -> None:
    callback = early_stopping(tmp_path, *overrides)
    assert isinstance(callback, TaskPatience) == (overrides[0] == OF_TASK[0])
    assert measurements(callback, values) == end
