"""What a person sees of a run is in its `train.log` too, and a log or terminal that cannot be written does not end it."""

import logging
import os
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from clip_exp.training import messages
from clip_exp.training.callbacks import Progress
from clip_exp.training.messages import LOG_ONLY, buffered_logging, logging_to
from clip_exp.training.metrics import StepMetrics
from clip_exp.training.skipped_steps import SkippedSteps
from tests.runs import Finished

log = logging.getLogger("clip_exp.training.anything")
foreign = logging.getLogger("foreign.library")
NONE_SKIPPED = SkippedSteps(0, lambda step: [])


FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="the system has no /dev/full")


def test_messages_are_on_the_terminal_and_in_the_log(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "s3cret-value")
    with logging_to(tmp_path):
        log.info("step %d", 1)
        log.warning("a disk is full, s3cret-value")
        log.info("only for later", extra=LOG_ONLY)
        foreign.warning("a library's own")
        thread = threading.Thread(target=lambda: 1 / 0, name="writer")
        thread.start()
        thread.join()
    log.info("after the run")
    errors = "warning: a disk is full, ***\nwarning: writer failed: division by zero\n"
    assert capsys.readouterr() == ("step 1\n", errors)
    logged = (tmp_path / "train.log").read_text(encoding="utf-8")
    assert [line.split(" ", 2)[2] for line in logged.splitlines()[:5]] == [
        "INFO clip_exp.training.anything: step 1",
        "WARNING clip_exp.training.anything: a disk is full, ***",
        "INFO clip_exp.training.anything: only for later",
        "WARNING foreign.library: a library's own",
        "WARNING clip_exp.training.messages: writer failed: division by zero",
    ]
    assert "Traceback" in logged


def test_what_was_shown_before_there_was_a_folder_begins_its_log_and_is_not_shown_again(
    tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_TOKEN", "s3cret-value")
    with buffered_logging() as earlier:
        log.info("%s: its index is made anew", "s3cret-value")
        log.warning("1 bad row was left out")
    with logging_to(tmp_path, earlier):
        log.info("step 1")
    assert capsys.readouterr() == ("***: its index is made anew\nstep 1\n", "warning: 1 bad row was left out\n")
    assert [line.split(" ", 2)[2] for line in (tmp_path / "train.log").read_text(encoding="utf-8").splitlines()] == [
        "INFO clip_exp.training.anything: ***: its index is made anew",
        "WARNING clip_exp.training.anything: 1 bad row was left out",
        "INFO clip_exp.training.anything: step 1",
    ]


def test_other_ranks_say_nothing(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "is_first_rank", lambda: False)
    with logging_to(tmp_path):
        log.warning("the first rank says it")
    assert capsys.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


@needs_full
def test_a_log_on_a_full_disk_costs_one_warning(tmp_path: Path, capsys) -> None:
    (tmp_path / "train.log").symlink_to(FULL)
    with logging_to(tmp_path):
        log.info("first")
        log.info("second")
    out, err = capsys.readouterr()
    assert out == "first\nsecond\n"
    assert err == f"warning: {tmp_path}/train.log cannot be written: No space left on device. Training continues.\n"


def test_a_log_that_cannot_be_opened_costs_one_warning(tmp_path: Path, capsys) -> None:
    (tmp_path / "train.log").mkdir()
    with logging_to(tmp_path):
        log.info("first")
    out, err = capsys.readouterr()
    assert out == "first\n"
    assert err.count("cannot be written: Is a directory") == 1


@needs_full
def test_a_terminal_that_is_a_file_on_a_full_disk_does_not_end_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with logging_to(tmp_path), os.fdopen(os.open(FULL, os.O_WRONLY), "wb", buffering=0) as full:
        monkeypatch.setattr(
            sys, "stdout", SimpleNamespace(write=lambda text: full.write(text.encode()), flush=full.flush)
        )
        log.info("a line")
    assert "a line" in (tmp_path / "train.log").read_text()


LATEST = {
    "samples_seen": 16,
    "train/loss": 2.5,
    "train/samples_per_s": 8.0,
    "train/data_wait_s": 0.5,
    "train/compute_s": 1.5,
}


@pytest.mark.parametrize(("kind", "shown"), [("lines", ["step 1/3", "val/loss"]), ("bar", ["val/loss"]), ("none", [])])
def test_the_log_has_the_lines_that_a_terminal_may_not_show(
    kind: str, shown: list[str], tmp_path: Path, capsys
) -> None:
    metrics = StepMetrics(1, 16, 96, NONE_SKIPPED)
    progress = Progress(kind, metrics)
    measured = {"val/loss": SimpleNamespace(item=lambda: 1.25)}
    trainer: Any = SimpleNamespace(global_step=1, callback_metrics=measured, sanity_checking=False)
    with logging_to(tmp_path):
        metrics.latest = LATEST
        progress.on_train_batch_end(trainer, SimpleNamespace(total_steps=3), None, None, 0)
        progress.on_validation_end(trainer, SimpleNamespace())
    step, validation = (tmp_path / "train.log").read_text().splitlines()
    assert "step 1/3  loss 2.5000  8 samples/s  500 ms waiting for data + 1.50 s computing  0:04 left" in step
    assert "val/loss 1.2500" in validation
    assert [
        " ".join(line.split()[:2]) if line[0] == "s" else line.split()[0]
        for line in capsys.readouterr().out.splitlines()
    ] == shown


def test_the_log_of_a_run_has_all_that_the_terminal_showed(single: Finished) -> None:
    logged = (single.folder / "train.log").read_text()
    folder, *lines = single.output.splitlines()
    assert folder.startswith("run folder:")
    assert [line for line in lines if line not in logged] == []
    assert "model vit_nano (" in lines[0]
    assert "data shapes (96 rows), strategy auto on 1 x cpu, precision 32-true, 20 steps of 16 pairs" in lines[0]
    for expected in ("step 20/20", "val/loss", f"run={single.folder}"):
        assert expected in logged
