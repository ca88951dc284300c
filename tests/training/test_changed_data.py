"""A run goes on in the data that it was begun with, and says what is different about other data."""

import json
from pathlib import Path

import pytest

from clip_exp.checkpoints.folders import STATE
from clip_exp.storage import file_sha256
from tests.conftest import Run
from tests.data.conftest import noise, write_table
from tests.exhaustive import repeat_beyond
from tests.runs import Train, run_folders, unfinish

RUN = (
    "model=vit_nano", "data=csv", "global_batch_size=4", "max_steps=4", "data.num_workers=0", "log_every_n_steps=1",
    "checkpoint_every_n_steps=2", "trainer.accelerator=cpu", "precision=32-true",
)  # fmt: skip


@pytest.fixture
def table(tmp_path: Path) -> Path:
    rows = [[f"{i}.png", f"image {i}"] for i in range(12)]
    for i in range(12):
        noise(i).save(tmp_path / f"{i}.png")
    return write_table(tmp_path / "pairs.csv", [["filepath", "title"], *rows])


def unfinished(train: Train, table: Path) -> Path:
    """A run that ended after its second step, whose table then got a row more."""
    run = train(*RUN, f"data.train={table}", output_dir=table.parent)
    unfinish(run.folder)
    with open(table, "a", encoding="utf-8") as file:
        file.write("3.png,one more\n")
    return run.folder


def test_changed_data_is_refused_by_name_and_taken_where_that_is_allowed(
    train: Train, command: Run, table: Path
) -> None:
    folder = unfinished(train, table)
    metrics = (folder / "metrics.csv").read_bytes()
    same = (*RUN, f"data.train={table}")
    result = command("train.py", *same, f"output_dir={table.parent}", cwd=table.parent)
    assert result.returncode == 4, result.stderr
    assert "pairs.csv has 13 rows instead of 12" in result.stderr
    assert "data.allow_changed=true" in result.stderr
    assert "Traceback" not in result.stderr
    assert (folder / "metrics.csv").read_bytes() == metrics
    assert len(list((folder / "checkpoints").iterdir())) == 2

    named = f"resume={folder}/checkpoints/step-000002"
    went_on = train(*same, named, "data.allow_changed=true", output_dir=table.parent)
    assert went_on.folder == folder
    assert went_on.summary["steps"] == 4
    assert "pairs.csv has 13 rows instead of 12" in (folder / "train.log").read_text()


def test_the_command_of_a_finished_run_trains_again_where_its_table_was_edited(train: Train, table: Path) -> None:
    same = (*RUN, f"data.train={table}")
    first = train(*same, output_dir=table.parent)
    with open(table, "a", encoding="utf-8") as file:
        file.write("3.png,one more\n")
    second = train(*same, output_dir=table.parent)
    assert f"Not resuming {first.folder}: pairs.csv has 13 rows instead of 12. Starting a new run." in second.output
    assert second.record["data"] != first.record["data"]
    assert run_folders(table.parent) == [first.folder, second.folder]
    again = train(*same, output_dir=table.parent)
    assert f"{second.folder}: this run is already finished" in again.output


def test_a_checkpoint_of_an_older_version_is_resumed(train: Train, table: Path) -> None:
    folder = unfinished(train, table)
    for file in (folder / "checkpoints").glob(f"*/{STATE}"):
        state = json.loads(file.read_text())
        del state["PairsDataModule"]["data"]
        file.write_text(json.dumps(state))
        manifest = file.with_name("manifest.json")
        values = json.loads(manifest.read_text())
        values["files"][STATE] = {"size": file.stat().st_size, "sha256": file_sha256(file)}
        del values["files"]["run_copy.json"], values["sha256"]
        manifest.write_text(json.dumps(values))
    named = f"resume={folder}/checkpoints/step-000002"
    assert train(*RUN, f"data.train={table}", named, output_dir=table.parent).summary["steps"] == 4


@pytest.mark.parametrize("strategy", repeat_beyond(("ddp",), ("ddp", "deepspeed_stage_2")))
def test_all_ranks_refuse_changed_data_with_one_message(strategy: str, train: Train, command: Run, table: Path) -> None:
    folder = unfinished(train, table)
    arguments = (*RUN, f"data.train={table}", f"output_dir={table.parent}", f"strategy={strategy}", "trainer.devices=2")
    result = command("train.py", *arguments, f"resume={folder}", cwd=table.parent)
    assert result.returncode == 4, result.stdout + result.stderr
    assert result.stderr.count("pairs.csv has 13 rows instead of 12") == 1
    assert "Traceback" not in result.stderr
    assert json.loads((run_folders(table.parent)[0] / "run.json").read_text())["exit_code"] == 4
