"""Devices that are not there, or do not share the batch, are refused before there is a folder."""

from unittest import mock

import pytest

from clip_exp.errors import ConfigError
from clip_exp.evaluation.tasks.zero_shot import ZeroShotTaskConfig
from clip_exp.training.preflight import check_train
from tests.compose import train_config


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
