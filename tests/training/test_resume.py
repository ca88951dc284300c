"""Nothing is lost: the same command resumes, under any strategy, and ends where it would have ended."""

import functools
import hashlib
import itertools
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from clip_exp.checkpoints.folders import checkpoints
from clip_exp.config.files import read_run_config
from clip_exp.runs import RunRecord
from clip_exp.training import opening
from clip_exp.training.opening import identity
from tests.conftest import REPOSITORY, Run
from tests.exhaustive import repeat_beyond
from tests.runs import TINY, Finished, Train, run_folders, unfinish

RUN = (
    *(o for o in TINY if not o.startswith("resume")),
    "max_steps=20",
    "log_every_n_steps=1",
    "val_every_n_steps=10",
    "checkpoint_every_n_steps=10",
)


def interrupted(single: Finished, output_dir: Path) -> Path:
    """A copy of the finished run as it was after the checkpoint of step 10."""
    folder = output_dir / "train" / single.folder.parent.name / single.folder.name
    shutil.copytree(single.folder, folder)
    shutil.rmtree(folder / "checkpoints" / "step-000020")
    unfinish(folder)
    return folder


def test_the_same_command_resumes_and_ends_bitwise_equal(single: Finished, train: Train, tmp_path) -> None:
    folder = interrupted(single, tmp_path)
    run = train(*RUN, output_dir=tmp_path)
    assert run.folder == folder
    assert "resuming from" in run.output
    assert run.losses == single.losses
    for name, weight in single.weights.items():
        assert torch.equal(run.weights[name], weight), name
    timing = ("train/samples_per_s", "train/data_wait_s", "train/compute_s")
    assert [{k: v for k, v in row.items() if k not in timing} for row in run.metrics] == [
        {k: v for k, v in row.items() if k not in timing} for row in single.metrics
    ]


OLDER_COLUMNS = {"train/lr": "lr", "train/samples_per_s": "samples_per_s", "train/data_wait_s": "data_wait_s"}


def test_a_run_of_an_older_version_is_resumed_and_keeps_its_metrics(
    single: Finished, train: Train, tmp_path: Path
) -> None:
    folder = interrupted(single, tmp_path)
    values = {**identity(read_run_config(folder)), "finetune.linear_probe_steps": 0}
    older = {key: value for key, value in values.items() if key != "finetune.freeze_towers_steps"}
    for file, names in {
        "metrics.csv": OLDER_COLUMNS,
        "config.yaml": {"freeze_towers_steps": "linear_probe_steps"},
    }.items():
        text = (folder / file).read_text()
        for name, former in names.items():
            assert name in text
            text = text.replace(name, former)
        (folder / file).write_text(text)
    sha256 = hashlib.sha256((folder / "config.yaml").read_bytes()).hexdigest()
    RunRecord(folder).update(fingerprint=opening._hash(opening.without_paths(older)), config_sha256=sha256)
    run = train(*RUN, output_dir=tmp_path)
    assert run.folder == folder
    assert "warning" not in run.output
    assert run.losses == single.losses
    assert [[*row] for row in run.metrics] == [[*row] for row in single.metrics]
    header = (folder / "metrics.csv").read_text().splitlines()[0]
    assert header == (single.folder / "metrics.csv").read_text().splitlines()[0]


def test_a_damaged_run_is_repaired_and_ends_bitwise_equal_and_a_person_sees_it(
    single: Finished, command: Run, tmp_path
) -> None:
    folder = tmp_path / "train" / single.folder.parent.name / single.folder.name
    shutil.copytree(single.folder, folder)
    (folder / "run.json").write_bytes(b"")
    with (folder / "checkpoints/step-000020/state.json").open("ab") as file:
        file.write(b"x")
    result = command("train.py", *RUN, f"output_dir={tmp_path}", cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    log = (folder / "train.log").read_text()
    for text in (result.stderr, log):
        assert "run.json is damaged (it is not valid JSON in line 1): the copy in step-000020 is used instead" in text
        assert "using step-000010:\n  step-000020: state.json has" in text
    assert result.stderr.count("run.json is damaged") == result.stderr.count("step-000020: state.json has") == 1
    run = Finished(folder, result.stdout)
    assert run.losses == single.losses
    assert run_folders(tmp_path) == [folder]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
        "damaged-step-000020", "step-000010", "step-000020",
    ]  # fmt: skip
    for name, weight in single.weights.items():
        assert torch.equal(run.weights[name], weight), name
    assert (run.record["status"], run.record["last_checkpoint_step"]) == ("finished", 20)


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_again_in_its_folder(
    single: Finished, train: Train, tmp_path
) -> None:
    folder = tmp_path / "train" / single.folder.parent.name / single.folder.name
    shutil.copytree(single.folder, folder)
    shutil.rmtree(folder / "checkpoints")
    RunRecord(folder).update(status="running", last_checkpoint_step=None)
    run = train(*RUN, output_dir=tmp_path)
    assert run.folder == folder
    assert "was stopped before its first checkpoint: starting again in the same folder" in run.output
    assert run.losses == single.losses
    assert run.record["last_checkpoint_step"] == 20


STRATEGIES = ("auto", "ddp", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3")
PAIRS = list(itertools.permutations(STRATEGIES, 2))
KEPT = [
    ("auto", "ddp"), ("auto", "deepspeed_stage_3"), ("deepspeed_stage_3", "auto"), ("deepspeed_stage_3", "deepspeed_stage_2"),
]  # fmt: skip


def under(strategy: str) -> tuple[str, ...]:
    """Overrides for a strategy: two ranks, but for `auto`."""
    return () if strategy == "auto" else (f"strategy={strategy}", "trainer.devices=2")


@pytest.fixture(scope="session")
def trained_under(single: Finished, train: Train) -> Callable[[str], Finished]:
    return functools.cache(lambda strategy: single if strategy == "auto" else train(*RUN, *under(strategy)))


@pytest.mark.parametrize("pair", repeat_beyond(KEPT, PAIRS), ids=" to ".join)
def test_a_run_resumes_under_another_strategy(
    pair: tuple[str, str], single: Finished, trained_under: Callable[[str], Finished], train: Train, tmp_path: Path
) -> None:
    before, after = pair
    interrupted(trained_under(before), tmp_path)
    run = train(*RUN, *under(after), output_dir=tmp_path)
    assert "resuming from" in run.output
    assert run.losses == pytest.approx(single.losses, rel=1e-5)
    torch.testing.assert_close(run.weights, single.weights, rtol=0, atol=1e-4)


@pytest.mark.parametrize("stage", repeat_beyond((), (1, 2, 3)))
def test_a_run_whose_weights_are_rounded_to_bf16_resumes_from_those_in_float32(
    stage: int, train: Train, tmp_path: Path
) -> None:
    """DeepSpeed makes the float32 weights that it steps from the rounded ones."""
    options = (*(option for option in RUN if not option.startswith("precision")), "precision=bf16-mixed")
    strategy = (f"strategy=deepspeed_stage_{stage}", "trainer.devices=2")
    whole = train(*options, *strategy)
    interrupted(whole, tmp_path)
    resumed = train(*options, *strategy, output_dir=tmp_path)
    assert resumed.losses == whole.losses
    assert all(torch.equal(resumed.weights[name], weight) for name, weight in whole.weights.items())


def test_a_run_that_lost_its_metrics_still_gets_its_report(single: Finished, train: Train, tmp_path: Path) -> None:
    folder = tmp_path / "train" / single.folder.parent.name / single.folder.name
    shutil.copytree(single.folder, folder)
    for name in ("metrics.csv", "report.html"):
        (folder / name).unlink()
    train(*RUN, output_dir=tmp_path, draw=True)
    assert (folder / "report.html").is_file()
    log = (folder / "train.log").read_text(encoding="utf-8")
    assert f"{folder / 'metrics.csv'} is missing: the metrics of the steps up to 20 are lost." in log


def test_a_finished_run_is_named_and_ends_well(single: Finished, train: Train, tmp_path) -> None:
    folder = tmp_path / "train" / single.folder.parent.name / single.folder.name
    shutil.copytree(single.folder, folder)
    left = [folder / name for name in (".lock-rank0", ".heartbeat-rank0", ".error-rank1")]
    for path in left:  # it was killed after its report
        path.touch()
    assert "this run is already finished" in train(*RUN, output_dir=tmp_path).output
    assert run_folders(tmp_path) == [folder]
    assert not any(path.exists() for path in left)


def test_a_run_killed_while_its_report_was_drawn_gets_it_by_the_same_command(
    single: Finished, train: Train, tmp_path
) -> None:
    folder = tmp_path / "train" / single.folder.parent.name / single.folder.name
    shutil.copytree(single.folder, folder)
    (folder / "report.html").unlink()
    assert "already finished" not in train(*RUN, output_dir=tmp_path).output
    run = Finished(folder, train(*RUN, output_dir=tmp_path).output)
    assert "this run is already finished" in run.output
    assert (folder / "report.html").is_file()
    assert run.metrics == single.metrics
    assert run.record["status"] == "finished"


SIGNAL_ITSELF = """
import os, signal, sys
import pytorch_lightning as pl

class SignalItself(pl.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 9:
            os.kill(os.getpid(), signal.SIGTERM)

import clip_exp.training.fit as fit
build = fit._build_callbacks
fit._build_callbacks = lambda *arguments: [SignalItself(), *build(*arguments)]
from clip_exp.cli import run
sys.exit(run("train", sys.argv[1:]))
"""


def test_a_run_that_is_stopped_at_a_validated_step_misses_nothing(
    single: Finished, train: Train, command, tmp_path
) -> None:
    (tmp_path / "stopped.py").write_text(SIGNAL_ITSELF)
    stopped = command(str(tmp_path / "stopped.py"), *RUN, f"output_dir={tmp_path}", cwd=tmp_path)
    assert stopped.returncode == 143, stopped.stdout + stopped.stderr
    run = train(*RUN, output_dir=tmp_path)
    assert run.losses == single.losses
    assert [row.get("val/loss") for row in run.metrics] == [row.get("val/loss") for row in single.metrics]


def test_going_on_from_a_named_earlier_checkpoint_gives_the_same_end(single: Finished, train: Train, tmp_path) -> None:
    folder = tmp_path / "train" / single.folder.parent.name / single.folder.name
    shutil.copytree(single.folder, folder)
    unfinish(folder)
    run = train(*(o for o in RUN), f"resume={folder}/checkpoints/step-000010", output_dir=tmp_path)
    assert run.losses == single.losses
    assert [path.name for path in checkpoints(folder)] == ["step-000010", "step-000020"]


@pytest.mark.parametrize("devices", repeat_beyond((2,), (1, 2)))
def test_a_signal_saves_the_step_and_ends_with_143(devices: int, tmp_path) -> None:
    arguments = [
        *TINY,
        "max_steps=100000",
        "log_every_n_steps=1",
        "checkpoint_every_n_steps=100000",
        "val_every_n_steps=100000",
    ]
    process = subprocess.Popen(
        [sys.executable, str(REPOSITORY / "train.py"), *arguments, f"trainer.devices={devices}", f"output_dir={tmp_path}"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while (
            not list(tmp_path.glob("train/*/*/metrics.csv")) and time.monotonic() < deadline and process.poll() is None
        ):
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 143, output
    folder = run_folders(tmp_path)[0]
    assert len(checkpoints(folder)) == 1
    assert json.loads((folder / "run.json").read_text())["status"] == "preempted"
