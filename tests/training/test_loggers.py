"""Loggers that a run can do without: what fails costs a warning, and `metrics.csv` stays."""

import threading
from pathlib import Path

import pytest
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.loggers.logger import Logger

from clip_exp.training.loggers import build_loggers, start_loggers
from tests.compose import train_config
from tests.training.tracking import tensorboard_hparams


def started(folder: Path, *overrides: str) -> list[Logger]:
    config = train_config("logger=tensorboard", *overrides)
    return start_loggers(build_loggers(config.logger, folder, config.name), config)


def test_a_logger_that_cannot_write_is_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "tensorboard").touch()
    assert [type(logger).__name__ for logger in started(tmp_path)] == ["MetricsCSV"]
    assert "TensorBoardLogger failed: " in caplog.text
    assert "Training continues without it" in caplog.text


def test_a_logger_that_fails_later_is_reported_once_and_called_no_more(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int | None] = []

    def fail(logger: Logger, metrics: dict[str, float], step: int | None = None) -> None:
        calls.append(step)
        if step == 2:
            raise ValueError("a value that cannot be logged") from OSError(28, "No space left on device")

    monkeypatch.setattr(TensorBoardLogger, "log_metrics", fail)
    threads = threading.active_count()
    _, tensorboard = started(tmp_path)
    calls.clear()
    for step in (1, 2, 3):
        tensorboard.log_metrics({"train/loss": 1.0}, step=step)
    tensorboard.save()
    tensorboard.finalize("success")
    assert calls == [1, 2]
    assert threading.active_count() == threads
    assert caplog.text.count("No space left on device") == 1


def test_what_a_logger_is_given_has_no_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "s3cret-value")
    _, tensorboard = started(tmp_path, "monitor='val/s3cret-value'")
    tensorboard.finalize("success")
    assert tensorboard_hparams(tmp_path / "tensorboard")["monitor"] == "val/***"
