"""Which way a monitored metric is better, and metrics that cannot be monitored."""

from pathlib import Path
from typing import Any

import pytest

from clip_exp.config.base import parse
from clip_exp.config.data import GenerateConfig, Generator
from clip_exp.config.evaluation import EvaluateConfig
from clip_exp.training.preflight import check_measures, check_validation_classes, monitor_mode
from tests.compose import train_config
from tests.small_runs import write_image


@pytest.mark.parametrize(
    ("monitor", "mode"),
    [
        ("val/loss", "min"),
        ("val/median_rank_i2t", "min"),
        ("val/recall@1_t2i", "max"),
        ("val/top1", "max"),
        ("coco_ranking/recall@5_i2t", "max"),
        ("coco_ranking/median_rank_t2i", "min"),
        ("lossless/top1", "max"),
        ("ranked/imagenet_a/top1", "max"),
    ],
)
def test_the_metric_decides_what_is_better_not_the_name_of_the_task(monitor: str, mode: str) -> None:
    assert monitor_mode(monitor, "auto") == mode
    assert {monitor_mode(monitor, given) for given in ("min", "max")} == {"min", "max"}


def folders(root: Path, classes: int) -> dict[str, Any]:
    for number in range(classes):
        write_image(root / f"class {number}" / "1.png", number)
    return {"kind": "zero_shot", "root": str(root), "templates": ["a {}."]}


@pytest.mark.parametrize(("classes", "refused"), [(5, True), (6, False)])
def test_top5_of_five_classes_cannot_be_monitored(tmp_path: Path, classes: int, refused: bool) -> None:
    config = train_config("task_every_n_steps=5", "monitor=flowers/top5")
    config.task = parse(EvaluateConfig, {"task": {"flowers": folders(tmp_path, classes)}}).task
    errors = [str(error) for error in check_measures(config)]
    assert len(errors) == refused
    assert all("monitor=flowers/top5 is not measured: with 5 classes" in error for error in errors)
    assert all(error.endswith("Use monitor=flowers/top1.") for error in errors)


def test_top5_of_validation_is_refused_once_its_classes_are_counted() -> None:
    config = train_config("data.label_key=label", "monitor=val/top5")
    config.data.generate = GenerateConfig(kind=Generator.digits)
    assert not check_measures(config)
    assert not [*check_validation_classes(config, 10)]
    (problem,) = check_validation_classes(config, 3)
    assert problem.endswith("Use monitor=val/top1.")
