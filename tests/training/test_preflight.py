"""Devices that are not there, or do not share the batch, and callbacks that conflict with a run are refused before there is a folder."""

from pathlib import Path
from unittest import mock

import pytest
import pytorch_lightning.callbacks as lightning

from clip_exp.errors import ConfigError
from clip_exp.evaluation.tasks.zero_shot import ZeroShotTaskConfig
from clip_exp.training.callbacks import REFUSED, extra_problems
from clip_exp.training.preflight import check_train
from tests.compose import train_config
from tests.runs import TINY, Train


@pytest.mark.parametrize(
    ("gpus", "overrides", "message"),
    [
        (1, ("trainer.devices=2",), "trainer.devices=2 requests 2 GPUs, but this machine has 1"),
        (6, ("trainer.devices=auto",), "global_batch_size=128 must be a multiple of the 6 processes"),
        (6, ("trainer.devices=auto", "trainer.accelerator=gpu"), "must be a multiple of the 6 processes"),
        (6, ("trainer.devices=5",), "global_batch_size=128 must be a multiple of the 5 processes"),
        (6, ("trainer.devices=[1,2,3]",), "global_batch_size=128 must be a multiple of the 3 processes"),
    ],
)  # fmt: skip
def test_devices_are_counted_before_the_run_begins(gpus: int, overrides: tuple[str, ...], message: str) -> None:
    config = train_config("data=shapes", "global_batch_size=128", *overrides)
    with (
        mock.patch("torch.cuda.is_available", return_value=True),
        mock.patch("torch.cuda.device_count", return_value=gpus),
        pytest.raises(ConfigError, match=message),
    ):
        check_train(config)


def test_a_task_downloads_its_data_once_and_where_nothing_else_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared: list[str] = []
    monkeypatch.setattr(ZeroShotTaskConfig, "prepare", lambda self, name, *_: prepared.append(name) or [])
    task = ("task=cifar10", "task.cifar10.root=x", "task.cifar10.download=true")
    check_train(train_config(*task))
    assert prepared == ["cifar10"]
    with pytest.raises(ConfigError, match="patience=3 has no effect"):
        check_train(train_config(*task, "patience=3"))
    monkeypatch.setattr("clip_exp.training.preflight.is_first_rank", lambda: False)
    check_train(train_config(*task))
    assert prepared == ["cifar10"]


# ------------------------------------------------------------------------------------------------ additional callbacks

WORKING = {
    "Callback": "", "DeviceStatsMonitor": "", "EarlyStopping": ", monitor: val/loss", "LambdaCallback": "",
    "LearningRateMonitor": "", "RichModelSummary": "", "Timer": ", duration: {hours: 3}",
}  # fmt: skip


def extra(name: str, arguments: str = "", key: str = "mine") -> str:
    return f"+callbacks.extra.{key}={{_target_: pytorch_lightning.callbacks.{name}{arguments}}}"


@pytest.mark.parametrize("name", sorted({*lightning.__all__} - WORKING.keys()))
def test_a_callback_of_lightning_that_conflicts_with_the_run_is_refused_with_what_to_use_instead(name: str) -> None:
    (problem,) = extra_problems(train_config(extra(name)))
    _, remedy = next(found for kind, found in REFUSED.items() if issubclass(getattr(lightning, name), kind))
    assert problem.startswith(f"callbacks.extra.mine: {name} cannot be used, since ")
    assert problem.endswith(f": {remedy}.")


OF_MINE = {
    "Checkpoints": lightning.ModelCheckpoint, "Accumulation": lightning.GradientAccumulationScheduler,
    "Average": lightning.StochasticWeightAveraging, "Bar": lightning.TQDMProgressBar, "Weights": lightning.WeightAveraging,
}  # fmt: skip
globals().update({name: type(name, (kind,), {}) for name, kind in OF_MINE.items()})


@pytest.mark.parametrize("name", OF_MINE)
def test_a_subclass_is_refused_like_its_class_before_it_is_built(name: str) -> None:
    config = train_config(f"+callbacks.extra.mine={{_target_: {__name__}.{name}, not_an_argument: 1}}")
    (problem,) = extra_problems(config)
    _, remedy = next(found for kind, found in REFUSED.items() if issubclass(OF_MINE[name], kind))
    assert problem.startswith(f"callbacks.extra.mine: {name} cannot be used, since ")
    assert problem.endswith(f": {remedy}.")


def test_the_other_callbacks_of_lightning_work_together_on_two_ranks(train: Train) -> None:
    given = [extra(name, arguments, name.lower()) for name, arguments in WORKING.items()]
    run = train(*TINY, *given, "max_steps=3", "val_every_n_steps=2", "log_every_n_steps=1", "trainer.devices=2")
    assert len(run.losses) == 3
    columns = (run.folder / "metrics.csv").read_text().splitlines()[0]
    assert "lr-AdamW" in columns
    assert "DeviceStatsMonitor" in columns
    assert "Total params" in run.output


def test_a_conflicting_callback_is_refused_before_there_is_a_folder(refused, tmp_path: Path) -> None:
    arguments = ", dirpath: ck, save_top_k: -1, every_n_train_steps: 2"
    done = refused("train.py", *TINY, "max_steps=3", extra("ModelCheckpoint", arguments), cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == (
        "error: callbacks.extra.mine: ModelCheckpoint cannot be used, since a run writes its checkpoints itself: set "
        "checkpoint_every_n_steps, and monitor to keep the best checkpoint.\n"
    )
    assert not list(tmp_path.glob("outputs/train/**/run.json"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            [extra("EarlyStopping", ", monitor: val/los")],
            r"^callbacks\.extra\.mine\.monitor=val/los is not a metric .*did you mean 'val/loss'\?$",
        ),
        (
            [extra("EarlyStopping", ", monitor: train/loss")],
            r"^callbacks\.extra\.mine\.monitor=train/loss is not a metric",
        ),
        (
            [extra("EarlyStopping", ", monitor: digits/top1"), "task=digits"],
            r"^callbacks\.extra\.mine\.monitor=digits/top1 is a metric of a task.*set monitor=digits/top1 and patience",
        ),
        (
            [extra("EarlyStopping", ", monitor: val/loss"), "monitor=val/loss", "patience=3"],
            r"^callbacks\.extra\.mine and patience would save their states under the same name: leave one of them out\.$",
        ),
        (
            [extra("Timer", key="a"), extra("Timer", key="b")],
            r"^callbacks\.extra\.b and callbacks\.extra\.a would save their states",
        ),
        (
            [extra("Timer", ", interval: hour")],
            r"^callbacks\.extra\.mine: pytorch_lightning.callbacks.Timer could not be created: .*interval",
        ),
        ([extra("Timer", ", durration: 3")], r"^callbacks\.extra\.mine\.durration is not an argument"),
        (
            [extra("LambdaCallback", ", on_train_start: print")],
            r"^callbacks\.extra\.mine\.on_train_start=print must be a function.*subclass of pytorch_lightning\.Callback",
        ),
        (
            ["+callbacks.extra.mine={_target_: pytorch_lightning.loggers.CSVLogger, save_dir: x}"],
            r"^callbacks\.extra\.mine: CSVLogger is not a callback",
        ),
    ],
)
def test_a_callback_that_would_fail_in_training_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        check_train(train_config(*TINY, "max_steps=3", *overrides))
    assert "\n" not in str(caught.value)


def test_every_conflicting_callback_is_reported_at_once() -> None:
    config = train_config(extra("ModelCheckpoint", key="a"), extra("TQDMProgressBar", key="b"), extra("Timer", key="c"))
    assert [problem.split(":")[0] for problem in extra_problems(config)] == ["callbacks.extra.a", "callbacks.extra.b"]
