"""Whatever happened to a run's files: it resumes from what is intact and says so, or stops; it never starts from zero unasked."""

import random
import shutil
from functools import cache
from pathlib import Path

import pytest

from clip_exp import runs
from clip_exp.config.schema import TrainConfig
from clip_exp.errors import CheckpointError
from clip_exp.runs import RunRecord
from clip_exp.training import opening
from clip_exp.training.opening import open_run
from clip_exp.training.resuming import candidates, report_damage
from tests.compose import train_config
from tests.training.damaged_runs import STEPS, damage, damaged_parts, write_run


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    return train_config(f"output_dir={tmp_path_factory.mktemp('outputs')}", "max_steps=30")


@pytest.fixture
def folder(config: TrainConfig) -> Path:
    """A run that was killed after its second checkpoint."""
    parent = Path(config.output_dir) / "train" / config.name
    if parent.exists():
        shutil.rmtree(parent)
    write_run(parent / "killed", config)
    return parent / "killed"


def start(config: TrainConfig) -> tuple[Path, int]:
    """What training does before it builds a model: the folder, and the step from which it resumes."""
    opened = open_run(config)
    opened.begin([])
    record = RunRecord(opened.folder)
    found = candidates(config, opened.folder, record)
    used = found.usable[0] if found.usable else None
    report_damage(found, opened.folder, record, used)
    return opened.folder, 0 if used is None else int(used.name.removeprefix("step-"))


def start_or_stop(config: TrainConfig) -> tuple[tuple[Path, int] | None, str]:
    """What `start` returns, or the message of exit code 4."""
    try:
        return start(config), ""
    except CheckpointError as error:
        return None, str(error)


def test_five_hundred_damaged_runs_resume_with_a_warning_or_stop(
    folder: Path, config: TrainConfig, monkeypatch: pytest.MonkeyPatch, capsys, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(runs.storage, "sync", lambda path: None)
    monkeypatch.setattr(opening, "to_yaml", cache_of_one(opening.to_yaml))
    monkeypatch.setattr(runs, "parse_run_config", cache(runs.parse_run_config))
    parse = cache(lambda text: runs.parse_run_config(text, "config.yaml"))
    read_run_config = runs.read_run_config

    def read_intact_once(run: Path) -> TrainConfig:
        intact = (run / "config.yaml").is_file() and (run / "config.yaml").read_bytes() == whole
        return parse(whole.decode()) if intact else read_run_config(run)

    monkeypatch.setattr(runs, "read_run_config", read_intact_once)
    whole = (folder / "config.yaml").read_bytes()
    intact = folder.parents[3] / "intact"
    shutil.copytree(folder, intact)
    outcomes = {"resumed": 0, "stopped": 0}
    for seed in range(500):
        shutil.rmtree(folder)
        shutil.copytree(intact, folder)
        what = f"{seed}: {damage(folder, intact, random.Random(seed))}"
        hurt = damaged_parts(folder, intact)
        there = {path.name for path in folder.glob("checkpoints/step-*")}
        good = [step for step in STEPS if f"step-{step:06d}" not in hurt]
        capsys.readouterr()
        caplog.clear()
        resumed, refused = start_or_stop(config)
        outcomes["resumed" if resumed else "stopped"] += 1
        if not good:
            assert "resume=never" in refused, (what, resumed, refused)
            continue
        assert resumed == (folder, max(good)), (what, refused)
        reported = capsys.readouterr().err + caplog.text
        for name in hurt & (there | {"run.json", "config.yaml"}):
            assert name in reported, (what, name, reported)
        if "step-000020" in hurt - there and "run.json" not in hurt:
            assert "of step 20" in reported, (what, reported)
    assert min(outcomes.values()) > 50, outcomes


def cache_of_one(function):  # of a configuration, which has no hash
    results = []

    def cached(value):
        results[:] = results or [function(value)]
        return results[0]

    return cached
