"""An earlier run is taken for the requested one only where both compute the same: the same data, weights and job of a sweep."""

import json
import os
import shutil
from pathlib import Path

import pytest

from clip_exp.config.files import older_names
from clip_exp.config.jobs import Job
from clip_exp.config.training import TrainConfig
from clip_exp.data.preflight import check_tables
from clip_exp.errors import ClipExpError, ConfigError
from clip_exp.runs import RunRecord
from clip_exp.storage import file_sha256
from clip_exp.training.launch import Training
from clip_exp.training.opening import Opening, _hash, identity, open_run, without_paths
from tests.checkpoints.test_folders import write
from tests.compose import train_config
from tests.data.conftest import noise, write_table

ROWS = 12


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two tables of the same images, in which the test works."""
    write_project(tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


def write_project(folder: Path, first: int = 0) -> None:
    (folder / "img").mkdir(parents=True)
    for i in range(ROWS):
        noise(first + i).save(folder / "img" / f"{i}.png")
    write_table(folder / "pairs.csv", [["filepath", "title"], *([f"img/{i}.png", f"image {i}"] for i in range(ROWS))])
    write_table(folder / "val.csv", [["filepath", "title"], *([f"img/{i}.png", f"held out {i}"] for i in range(4))])


@pytest.fixture
def config(project: Path) -> TrainConfig:
    """A configuration with relative paths and an output folder elsewhere."""
    overrides = ("model=vit_nano", "data=csv", "data.train=pairs.csv", "data.val=val.csv", "max_steps=4")
    return train_config(*overrides, f"output_dir={project.parent}/outputs")


def opened(config: TrainConfig, job: Job | None = None) -> Opening:
    return open_run(config, check_tables(config).describe(config.data), job)


def earlier(config: TrainConfig, finished: bool, job: Job | None = None) -> Path:
    """A run of the configuration that has a checkpoint, or has finished."""
    opening = opened(config, job)
    opening.begin([])
    write(opening.folder, 2)
    if finished:
        finish(opening.folder)
    return opening.folder


def finish(folder: Path) -> None:
    RunRecord(folder).finish("finished")
    (folder / "report.html").write_text("")


def add_row(table: Path) -> None:
    with table.open("a", encoding="utf-8") as file:
        file.write("img/3.png,one more\n")


def use_other_images(project: Path) -> None:
    noise(77).save(project / "img" / "0.png")


CHANGES = {
    "pairs.csv has 13 rows instead of 12": lambda project: add_row(project / "pairs.csv"),
    "data.val: val.csv has 5 rows instead of 4": lambda project: add_row(project / "val.csv"),
    "2 of 16 sampled images have different content": use_other_images,
}


@pytest.mark.parametrize("message", CHANGES)
def test_a_finished_run_in_other_data_is_another_run(message: str, project: Path, config: TrainConfig, capsys) -> None:
    folder = earlier(config, finished=True)
    assert opened(config).complete
    CHANGES[message](project)
    capsys.readouterr()
    second = opened(config)
    assert (second.finished, second.folder == folder) == (False, False)
    assert f"Not resuming {folder}: {message}. Starting a new run." in capsys.readouterr().out
    second.begin([])
    write(second.folder, 4)
    finish(second.folder)
    assert opened(config).folder == second.folder
    assert "Not resuming" not in capsys.readouterr().out


def test_an_unfinished_run_is_not_started_again_where_its_data_changed(project: Path, config: TrainConfig) -> None:
    folder = earlier(config, finished=False)
    add_row(project / "val.csv")
    assert opened(config).folder == folder, "where training refuses the data by name"
    restored = config.model_copy(update={"resume": "never"})
    other = opened(restored)
    other.begin([])
    write(other.folder, 1)
    assert opened(config).folder == other.folder, "which is in the same data"


def test_the_changed_data_of_a_refused_start_is_not_what_the_run_was_in(project: Path, config: TrainConfig) -> None:
    folder = earlier(config, finished=False)
    noted = RunRecord(folder).values["data"]
    add_row(project / "pairs.csv")
    opened(config).begin([])
    assert RunRecord(folder).values["data"] == noted
    opened(config.model_copy(update={"data": config.data.model_copy(update={"allow_changed": True})})).begin([])
    assert RunRecord(folder).values["data"] != noted


def test_an_unfinished_run_keeps_its_folder_where_an_image_was_repaired(
    project: Path, config: TrainConfig, capsys
) -> None:
    folder = earlier(config, finished=False)
    use_other_images(project)
    opening = opened(config)
    assert opening.folder == folder
    opening.begin([])
    assert "2 of 16 sampled images have different content than when the run started" in capsys.readouterr().err


@pytest.mark.parametrize("finished", [False, True])
def test_a_moved_project_is_the_same_run_and_other_data_at_the_same_relative_path_is_not(
    finished: bool, project: Path, config: TrainConfig, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    folder = earlier(config, finished)
    moved, other, images = (project.parent / name for name in ("moved", "other", "images"))
    shutil.copytree(project, moved)
    write_project(images, first=50)
    shutil.copytree(project, other)
    add_row(other / "pairs.csv")
    monkeypatch.chdir(moved)
    assert (opened(config).folder, opened(config).finished) == (folder, finished)
    output = capsys.readouterr().out
    assert (
        f"{folder}: the data was moved, and its contents are the same: data.train is {moved}/pairs.csv instead of {project}/pairs.csv"
        in output
    )
    monkeypatch.chdir(images)
    assert opened(config).folder != folder, "equal tables beside other images"
    monkeypatch.chdir(other)
    assert opened(config).folder != folder
    output = capsys.readouterr().out
    assert f"data.train is {other}/pairs.csv instead of {project}/pairs.csv" in output
    assert "pairs.csv has 13 rows instead of 12" in output


def test_a_named_run_resumes_in_moved_data_and_not_in_other_data(project: Path, config: TrainConfig) -> None:
    folder = earlier(config, finished=False)
    named = config.model_copy(
        update={
            "resume": str(folder),
            "data": config.data.model_copy(update={"train": str(project.parent / "new" / "pairs.csv")}),
        }
    )
    shutil.copytree(project, project.parent / "new")
    assert opened(named).folder == folder
    add_row(project.parent / "new" / "pairs.csv")
    with pytest.raises(ConfigError, match=r"other values of data\.train"):
        opened(named)


def test_a_run_of_an_older_version_is_recognized_by_its_configuration_alone(project: Path, config: TrainConfig) -> None:
    folder = earlier(config, finished=True)
    record = RunRecord(folder)
    for key in ("paths", "data", "scored_tasks"):
        del record.values[key]
    record.update(fingerprint=_hash(older_names(identity(config))))
    add_row(project / "pairs.csv")
    assert opened(config).complete
    other = config.model_copy(update={"data": config.data.model_copy(update={"train": "val.csv"})})
    assert opened(other).folder != folder, "whose path was part of it"


def test_a_run_whose_default_was_another_one_is_that_of_an_older_version(project: Path, config: TrainConfig) -> None:
    folder = earlier(config, finished=True)
    formats = ["JPEG", "PNG", "WEBP", "GIF", "BMP"]
    older = without_paths({**identity(config), "data.image_formats": formats})
    RunRecord(folder).update(fingerprint=_hash(older))
    assert opened(config).folder == folder
    only_these = config.model_copy(update={"data": config.data.model_copy(update={"image_formats": ["JPEG", "PNG"]})})
    assert opened(only_these).folder != folder


def test_a_run_without_further_columns_is_that_of_an_older_version_and_one_with_them_another(
    project: Path, config: TrainConfig
) -> None:
    assert not config.data.columns
    assert "data.columns" not in identity(config), "which older versions did not have"
    folder = earlier(config, finished=False)
    rows = [[f"img/{i}.png", f"image {i}", str(i)] for i in range(ROWS)]
    write_table(project / "pairs.csv", [["filepath", "title", "score"], *rows])
    assert opened(config).folder == folder
    wide = config.model_copy(update={"data": config.data.model_copy(update={"columns": ["score"]})})
    assert opened(wide).folder != folder


@pytest.mark.parametrize("finished", [False, True])
def test_replaced_weights_are_another_start_and_moved_ones_the_same(
    finished: bool, project: Path, config: TrainConfig, capsys
) -> None:
    weights = project / "start.safetensors"
    weights.write_bytes(b"weights")
    config = config.model_copy(update={"pretrained": "start.safetensors"})
    folder = earlier(config.model_copy(update={"pretrained": None}), finished)
    noted = {"path": str(weights), "sha256": file_sha256(weights)}
    paths = {**RunRecord(folder).values["paths"], "pretrained": [str(weights)]}
    RunRecord(folder).update(pretrained=noted, paths=paths)
    assert opened(config).folder == folder
    weights.rename(project / "elsewhere.safetensors")
    assert opened(config.model_copy(update={"pretrained": "elsewhere.safetensors"})).folder == folder
    assert "Not resuming" not in capsys.readouterr().out
    weights.write_bytes(b"other weights")
    with pytest.raises(ClipExpError, match=r"start\.safetensors"):  # which is no file of weights, and is read now
        opened(config)
    assert f"Not resuming {folder}: pretrained=start.safetensors has other weights (sha256 " in capsys.readouterr().out
    with pytest.raises(ConfigError):
        opened(config.model_copy(update={"pretrained": "laion2b"}))
    assert f"pretrained is laion2b instead of {weights}" in capsys.readouterr().out


def test_a_finished_run_stays_finished_where_scoring_it_fails(project: Path, config: TrainConfig) -> None:
    folder = earlier(config, finished=True)
    Training(config, [], check_tables(config), None).note(folder, "failed", exit_code=3)
    assert RunRecord(folder).values["status"] == "finished"
    assert opened(config).complete


def job(number: int, sweep: str = "first", micro: int = 4) -> Job:
    return Job(sweep, number, [f"micro_batch_size={micro}"])


@pytest.mark.parametrize("finished", [False, True])
def test_a_job_of_a_sweep_takes_no_other_jobs_folder_and_the_same_sweep_its_own(
    finished: bool, config: TrainConfig, capsys
) -> None:
    sweep = [job(0, micro=4), job(1, micro=8), job(2, micro=8)]  # the last two are the same
    folders = [earlier(config, finished, each) for each in sweep]
    assert len(set(folders)) == 3
    assert "it belongs to the job micro_batch_size=4 of a sweep. Starting a new run." in capsys.readouterr().out
    again = [opened(config, each._replace(sweep="second")) for each in sweep]
    assert [opening.folder for opening in again] == folders
    for opening in again:
        opening.claim()
    extended = [job(0, "third", 2), job(1, "third", 4), job(2, "third", 8), job(3, "third", 8), job(4, "third", 8)]
    expected = [None, folders[0], folders[2], folders[1], None]
    for each, folder in zip(extended, expected, strict=True):
        opening = opened(config, each)
        assert opening.folder == folder or (folder is None and opening.folder not in folders), each
        opening.claim()
    assert opened(config).folder in folders, "outside a sweep any of them computes what is requested"


def test_a_folder_that_a_job_of_the_same_sweep_has_just_begun_is_left_to_it(config: TrainConfig) -> None:
    first = opened(config, job(0))
    first.begin([])  # and was stopped, or works in another process
    assert opened(config, job(1)).folder != first.folder
    assert opened(config, job(0)).folder == first.folder


def test_what_run_json_says_of_the_data_is_brief(project: Path, config: TrainConfig, monkeypatch) -> None:
    for i in range(40):
        shutil.copy(project / "pairs.csv", project / f"part-{i:02}.csv")
    many = config.model_copy(update={"data": config.data.model_copy(update={"train": "part-*.csv"})})
    described = check_tables(many).describe(many.data)
    assert described is not None
    (files,) = (source["files"] for source in described["sources"])
    assert list(files) == ["40 files from part-00.csv to part-39.csv"]
    assert len(described["images"]) <= 32
    folder = earlier(many, finished=True)
    assert RunRecord(folder).values["data"] == json.loads(json.dumps(described))
    assert os.path.getsize(folder / "run.json") < 10_000
    add_row(project / "part-20.csv")
    assert opened(many).folder != folder
