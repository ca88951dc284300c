"""Whatever happened to a run's files: it resumes from what is intact and says so, or stops; it never starts from zero unasked."""

import os
import random
import shutil
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from clip_exp import runs
from clip_exp.checkpoints.folders import folder_of
from clip_exp.checkpoints.io import SafeCheckpointIO
from clip_exp.config.files import read_run_config
from clip_exp.config.training import TrainConfig
from clip_exp.errors import CheckpointError
from clip_exp.loading import source_of_checkpoint, source_of_run
from clip_exp.models.clip import build_model
from clip_exp.runs import RunRecord, create_run_folder
from clip_exp.training import opening
from clip_exp.training.fit import candidates, first_that_loads, report_damage
from clip_exp.training.module import CLIPModule
from clip_exp.training.opening import open_run
from tests.compose import train_config
from tests.training.damaged_runs import STEPS, contents_of, damage, damaged_parts, write_run


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


@pytest.mark.parametrize("seeds", [range(100), pytest.param(range(100, 500), marks=pytest.mark.exhaustive)])
def test_damaged_runs_resume_with_a_warning_or_stop(
    seeds: range,
    folder: Path,
    tmp_path: Path,
    config: TrainConfig,
    monkeypatch: pytest.MonkeyPatch,
    capsys,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(runs.storage, "sync", lambda path: None)
    monkeypatch.setattr(opening, "to_yaml", cache_of_one(opening.to_yaml))
    monkeypatch.setattr(runs, "parse_run_config", cache(runs.parse_run_config))
    parse = cache(lambda text: runs.parse_run_config(text, "config.yaml"))
    read_run_config = runs.read_run_config

    def read_intact_once(run: Path, *, check_targets: bool = True) -> TrainConfig:
        intact = (run / "config.yaml").is_file() and (run / "config.yaml").read_bytes() == whole
        return parse(whole.decode()) if intact else read_run_config(run, check_targets=check_targets)

    monkeypatch.setattr(runs, "read_run_config", read_intact_once)
    whole = (folder / "config.yaml").read_bytes()
    saved, intact = tmp_path / "saved", contents_of(folder)
    shutil.copytree(folder, saved)
    outcomes = {"resumed": 0, "stopped": 0}
    for seed in seeds:
        shutil.rmtree(folder)
        shutil.copytree(saved, folder)
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
    assert min(outcomes.values()) > len(seeds) / 10, outcomes


def cache_of_one(function):  # of a configuration, which has no hash
    results = []

    def cached(value):
        results[:] = results or [function(value)]
        return results[0]

    return cached


@pytest.mark.parametrize(
    ("lose", "step"),
    [("run.json", 20), ("config.yaml", 20), ("step-000020", 10)],
)
def test_what_is_lost_is_restored_from_a_checkpoint_or_replaced_by_an_earlier_one(
    lose: str, step: int, folder: Path, config: TrainConfig, capsys, caplog: pytest.LogCaptureFixture
) -> None:
    before = RunRecord(folder).values
    (place,) = folder.rglob(lose)
    shutil.rmtree(place) if place.is_dir() else place.write_bytes(b"")
    assert start(config) == (folder, step)
    assert lose.replace("step-0000", "step ") in capsys.readouterr().err + caplog.text
    record = RunRecord(folder).values
    assert {key: record[key] for key in ("argv", "start", "fingerprint")} == {
        key: before[key] for key in ("argv", "start", "fingerprint")
    }
    assert record["last_checkpoint_step"] == 20
    assert read_run_config(folder) == config


def test_other_commands_read_the_copy_of_a_configuration_that_is_lost(
    folder: Path, config: TrainConfig, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "config.yaml").unlink()
    for source in (source_of_run(folder), source_of_checkpoint(folder / "checkpoints/step-000010")):
        assert source.run == config
    assert caplog.text.count("config.yaml is missing: the copy in step-000020 is used instead") == 2
    assert not (folder / "config.yaml").exists(), "which belongs to the run"


def test_a_run_that_nothing_describes_any_more_is_not_passed_over(folder: Path, config: TrainConfig) -> None:
    shutil.rmtree(folder / "checkpoints")
    (folder / "run.json").unlink()
    with pytest.raises(CheckpointError, match=r"has trained before, .*resume=never"):
        open_run(config)
    (folder / "config.yaml").write_text("model: {}")
    with pytest.raises(CheckpointError, match=r"killed may be the run to resume, .*run.json is missing.*resume=never"):
        open_run(config)
    (folder / "metrics.csv").unlink()
    assert open_run(config).folder != folder, "it has never trained"


def test_a_run_that_lost_its_checkpoints_stops_until_it_is_to_start_over(folder: Path, config: TrainConfig) -> None:
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(CheckpointError, match=r"had a checkpoint of step 20, .*resume=never"):
        open_run(config)
    with pytest.raises(CheckpointError, match=r"had a checkpoint of step 20, .*resume=never"):
        open_run(config.model_copy(update={"resume": str(folder)}))
    again = open_run(config.model_copy(update={"resume": "never"}))
    assert again.folder != folder


def test_a_run_whose_checkpoints_are_all_damaged_says_what_is_wrong_with_each(
    folder: Path, config: TrainConfig
) -> None:
    (folder / "checkpoints/step-000010/manifest.json").unlink()
    (folder / "checkpoints/step-000020/state.json").write_text("{}")
    with pytest.raises(
        CheckpointError, match=r"(?s)resume=never.*step-000020: state.json has 2.*step-000010: manifest.json is missing"
    ):
        start(config)


def test_the_next_start_removes_what_a_killed_one_was_writing(folder: Path, config: TrainConfig) -> None:
    (folder / ".writing-tokenizer-0123").mkdir()
    (folder / "eval").mkdir()
    for name in (".writing-run.json-0123", ".writing-report.html-0123", "eval/.writing-digits.json-0123"):
        (folder / name).touch()
    start(config)
    assert not [path for path in folder.rglob("*") if path.name.startswith(".writing-")]


def test_starts_that_were_killed_before_a_checkpoint_share_one_folder(config: TrainConfig, capsys) -> None:
    config = config.model_copy(update={"name": "empty"})
    first = open_run(config)
    assert "starting again" not in capsys.readouterr().out
    first.begin([])
    for _ in range(2):
        opened = open_run(config)
        assert opened.folder == first.folder
        opened.begin([])
        assert (
            f"{first.folder} was stopped before its first checkpoint: starting again in the same folder"
            in capsys.readouterr().out
        )
    assert len(RunRecord(first.folder).values["resumed"]) == 2
    assert [path.name for path in first.folder.parent.iterdir()] == [first.folder.name]
    assert open_run(config.model_copy(update={"resume": str(first.folder)})).folder == first.folder
    assert "starting again in the same folder" in capsys.readouterr().out
    with runs.lock(first.folder):
        other = open_run(config)
    assert other.folder != first.folder, "which a living process uses"
    assert open_run(config.model_copy(update={"seed": 1})).folder not in (first.folder, other.folder)


def test_the_run_to_resume_is_chosen_by_progress_and_recorded_time_not_by_name(
    folder: Path, config: TrainConfig
) -> None:
    parent = folder.parent

    def copy(name: str, **values: object) -> Path:
        shutil.copytree(folder, parent / name)
        RunRecord(parent / name).update(**values)
        return parent / name

    unused = create_run_folder(config.output_dir, "train", config.name)  # has no checkpoint
    opening.Opening(unused, False, config, config, {}).begin([])
    RunRecord(folder).update(start="2026-01-01T10:00:00+00:00")
    later = copy("2020-01-01_00-00-00_10", start="2026-01-01T12:00:00+00:00")  # the clock of its name was wrong
    copy("2026-11-30_00-00-00_2", start="2026-01-01T11:00:00+00:00")
    assert open_run(config).folder == later
    shutil.copytree(later / "checkpoints/step-000020", later / "checkpoints/step-000023")
    assert open_run(config).folder == later
    further = copy("2019-01-01_00-00-00", start="2025-01-01T12:00:00+00:00", last_checkpoint_step=25)
    assert open_run(config).folder == further


class Data(NamedTuple):
    """As much of a data module as loading asks for."""

    global_batch_size: int = 16


BROKEN = {
    "a weight of another shape": lambda state: state["state_dict"].update({"model.logit_scale": torch.ones(7)}),
    "a missing weight": lambda state: state["state_dict"].pop("model.logit_scale"),
    "no optimizer": lambda state: state.update(optimizer_states=[]),
    "an optimizer of other parameters": lambda state: state["optimizer_states"][0]["param_groups"][0]["params"].pop(),
    "another position": lambda state: state["Data"].update(samples_seen=5),
    "no position": lambda state: state.pop("Data"),
    "no schedule": lambda state: state.pop("lr_schedulers"),
    "a tensor that is not there": lambda state: state.update(extra={"__tensor__": "nowhere"}),
}


@pytest.fixture(scope="module")
def module(config: TrainConfig) -> CLIPModule:
    return CLIPModule(build_model(config.model), torch.nn.Identity(), config, 10)


def state_of(module: CLIPModule, step: int) -> dict[str, Any]:
    names = iter(module.parameter_names)
    groups = [{"params": [next(names) for _ in range(size)]} for size in module.group_sizes]
    return {
        "state_dict": dict(module.state_dict()),
        "global_step": step,
        "epoch": 0,
        "loops": {},
        "lr_schedulers": [{}],
        "random_states": [],
        "optimizer_states": [{"state": {}, "param_groups": groups}],
        "Data": {"samples_seen": step * Data().global_batch_size},
    }


@pytest.mark.parametrize("what", BROKEN)
def test_a_checkpoint_that_does_not_load_is_passed_over_unless_it_was_named(
    what: str, tmp_path: Path, config: TrainConfig, module: CLIPModule, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2):
        state = state_of(module, step)
        if step == 2:
            BROKEN[what](state)
        SafeCheckpointIO().save_checkpoint(state, folder_of(tmp_path, step))
    record, newest = RunRecord(tmp_path), folder_of(tmp_path, 2)
    found = candidates(config, tmp_path, record)
    assert found.usable[0] == newest, "its manifest is right"
    used = first_that_loads(found, tmp_path, record, module, Data())  # type: ignore[arg-type]
    assert used == folder_of(tmp_path, 1)
    assert "using step-000001" in caplog.text
    assert "step-000002: cannot be loaded" in caplog.text
    named = candidates(config.model_copy(update={"resume": str(newest)}), tmp_path, record)
    with pytest.raises(CheckpointError, match=r"resume=.*step-000002 cannot be loaded: .*Set resume to another"):
        first_that_loads(named, tmp_path, record, module, Data())  # type: ignore[arg-type]


def test_what_a_run_has_written_is_on_the_disk_before_its_checkpoint_counts(
    tmp_path: Path, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def note(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    folder = create_run_folder(tmp_path / "out", "train", "x")
    assert {str(folder.parent), str(folder.parents[1]), str(folder.parents[2])} <= set(synced)
    opening.Opening(folder, False, config, config, {}).begin([])
    names = [Path(path).name for path in synced]
    assert [name.split("-")[1] for name in names if name.startswith(".writing")] == ["config.yaml", "run.json"]
    (folder / "metrics.csv").write_text("step\n1\n")
    io = SafeCheckpointIO()
    io.on_saved = RunRecord(folder).acknowledge
    synced.clear()
    io.save_checkpoint({"state_dict": {}, "global_step": 1}, folder_of(folder, 1))
    order = [Path(path).name.removeprefix(".writing-").rpartition("-")[0] or Path(path).name for path in synced]
    assert order[-4:] == ["checkpoints", "metrics.csv", "run.json", folder.name.rpartition("-")[0]]
    assert RunRecord(folder).values["last_checkpoint_step"] == 1
