"""A run on any layout of the data trains, validates and resumes as one on a table, for any number of workers and ranks."""

import json
import shutil
from pathlib import Path

import pytest

from tests.conftest import Train
from tests.data.layouts import LAYOUTS
from tests.exhaustive import repeat_beyond
from tests.runs import TINY, Finished

RUN = (
    *(each for each in TINY if not each.startswith(("data", "global_batch", "resume"))),
    "data=csv", "data.shuffle=full", "global_batch_size=4", "max_steps=8", "log_every_n_steps=1", "val_every_n_steps=4",
    "checkpoint_every_n_steps=2", "keep_checkpoints=all",
)  # fmt: skip


def overrides(name: str, folder: Path, workers: int) -> tuple[str, ...]:
    path, keys = LAYOUTS[name](folder / "data")
    named = (f"data.train={path}", f"data.val={path}", *(f"data.{key}={value}" for key, value in keys.items()))
    return (*RUN, *named, f"data.num_workers={workers}")


@pytest.fixture(scope="module")
def on_a_table(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return train(*overrides("csv", tmp_path_factory.mktemp("csv"), 0))


def scores(run: Finished) -> list[float]:
    return [row["val/loss"] for row in run.metrics if row.get("val/loss") is not None]


@pytest.mark.parametrize("name", repeat_beyond(["parquet", "text_files"], sorted(LAYOUTS.keys() - {"csv"})))
def test_every_layout_trains_as_a_table_does(name: str, on_a_table: Finished, train: Train, tmp_path: Path) -> None:
    words = overrides(name, tmp_path, 2)
    whole = train(*words, output_dir=tmp_path)
    assert whole.losses == on_a_table.losses
    assert scores(whole) == scores(on_a_table)
    as_if_killed(whole.folder, 4)
    resumed = train(*words, "data.num_workers=0", "strategy=ddp", "trainer.devices=2", output_dir=tmp_path)
    assert resumed.folder == whole.folder
    assert resumed.losses == pytest.approx(on_a_table.losses, abs=1e-5)
    assert scores(resumed) == pytest.approx(scores(on_a_table), abs=1e-5)


def as_if_killed(run: Path, step: int) -> None:
    """Leave of a finished run what a kill after a checkpoint leaves."""
    for checkpoint in (run / "checkpoints").iterdir():
        if int(checkpoint.name.rpartition("-")[2]) > step:
            shutil.rmtree(checkpoint)
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "status": "running", "last_checkpoint_step": step}))
    (run / "summary.json").unlink()
