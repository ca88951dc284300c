"""Training on a user's Dataset: the same run with any workers and ranks and after a restart, and messages before a run folder exists."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from clip_exp.training.opening import fingerprint
from tests.compose import train_config
from tests.conftest import DOOR, Run
from tests.runs import Finished, Train, run_folders, unfinish

RUN = (
    "model=vit_nano", "data=custom", "data._target_=tests.datasets.Noisy", "data.count=40", "name=custom", "global_batch_size=16",
    "precision=32-true", "trainer.accelerator=cpu", "optimizer.lr=1e-3", "log_every_n_steps=1", "max_steps=6",
    "val_every_n_steps=3", "checkpoint_every_n_steps=3", "data.val={_target_: tests.datasets.Pairs, start: 1000, count: 12}",
)  # fmt: skip


@pytest.fixture(scope="module")
def whole(train: Train) -> Finished:
    return train(*RUN, "data.num_workers=0")


def interrupted(run: Finished, output_dir: Path) -> Path:
    """A copy of the finished run as it was after the checkpoint of step 3."""
    folder = output_dir / "train" / "custom" / run.folder.name
    shutil.copytree(run.folder, folder)
    shutil.rmtree(folder / "checkpoints" / "step-000006")
    unfinish(folder)
    return folder


def test_it_validates_with_labels_and_its_record_describes_the_dataset(whole: Finished) -> None:
    assert {"val/recall@1_i2t", "val/top1", "val/loss"} <= whole.metrics[-1].keys()
    (source,) = whole.record["data"]["sources"]
    assert source["files"].keys() == {"tests.datasets.Noisy"}
    assert source["files"]["tests.datasets.Noisy"]["rows"] == 40
    assert len(whole.record["data"]["images"]) == 16 + 12
    assert whole.summary["data"] == "custom"


def test_it_resumes_with_other_workers_and_ends_bitwise_equal(whole: Finished, train: Train, tmp_path: Path) -> None:
    folder = interrupted(whole, tmp_path)
    run = train(*RUN, "data.num_workers=2", output_dir=tmp_path)
    assert run.folder == folder
    assert (
        "only the length of tests.datasets.Noisy and tests.datasets.Pairs is compared"
        in (folder / "train.log").read_text()
    )
    assert run.losses == whole.losses
    for name, weight in whole.weights.items():
        assert torch.equal(run.weights[name], weight), name


def test_two_ranks_compute_what_one_process_does(whole: Finished, train: Train) -> None:
    run = train(*RUN, "trainer.devices=2", "data.num_workers=1")
    assert run.losses == pytest.approx(whole.losses, rel=1e-5)
    torch.testing.assert_close(run.weights, whole.weights, rtol=0, atol=1e-4)
    ours, theirs = ({k: v for k, v in r.metrics[-1].items() if k.startswith("val/")} for r in (run, whole))
    assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-6)


def test_other_arguments_are_another_run_and_another_length_cannot_be_resumed(
    whole: Finished, train: Train, command: Run, tmp_path: Path
) -> None:
    folder = interrupted(whole, tmp_path)
    other = train(*RUN, "data.num_workers=0", "data.start=5", "max_steps=1", "val_every_n_steps=1", output_dir=tmp_path)
    assert other.folder != folder
    changed = ("data.count=38", f"resume={folder}", "data.num_workers=0")
    result = command("train.py", *RUN, *changed, f"output_dir={tmp_path}", cwd=tmp_path)
    assert result.returncode == 2, result.stdout + result.stderr
    assert f"resume={folder}: {folder} was trained with other values of data.count" in result.stderr


def test_image_root_is_part_of_the_identity_if_it_is_an_argument_and_not_if_it_is_the_folder_of_a_table() -> None:
    def of(*options: str) -> set[str]:
        custom = ("data=custom", "data._target_=tests.datasets.Named", "data.max_rows=16", *options)
        return {fingerprint(train_config(*custom, f"data.image_root={root}")) for root in ("/one", "/other")}

    assert len(of()) == 2
    assert len(of("data.val=held_out.csv")) == 1


VERSIONED = (
    *(o for o in RUN if not o.startswith(("data._target_", "data.val", "val_"))),
    "data._target_=tests.datasets.OfFile",
)


def test_a_fingerprint_that_changed_is_refused_by_name(train: Train, command: Run, tmp_path: Path) -> None:
    content = tmp_path / "version.txt"
    content.write_text("1")
    options = (*VERSIONED, f"data.file={content}", "data.num_workers=0")
    folder = interrupted(train(*options), tmp_path)
    content.write_text("2")
    result = command("train.py", *options, f"output_dir={tmp_path}", cwd=tmp_path)
    assert result.returncode == 4, result.stdout + result.stderr
    assert "tests.datasets.OfFile has different content in its 40 rows" in result.stderr
    assert run_folders(tmp_path) == [folder]


REFUSED = {
    "an IterableDataset": (["data._target_=tests.datasets.Streamed"], 2, "is an IterableDataset"),
    "no length": (["data._target_=tests.datasets.WithoutLength"], 2, "has no __len__ or no __getitem__"),
    "no target": ([], 2, "data._target_ has no value: set it (data._target_=…)."),
    "an unknown argument": (
        ["data._target_=tests.datasets.Pairs", "data.cuont=3"], 2, "data.cuont is not an argument of tests.datasets.Pairs: did you mean 'count'?",
    ),
    "a table as well": (
        ["data._target_=tests.datasets.Pairs", "data.train=pairs.csv"], 2, "data._target_ and data.train exclude each other",
    ),
    "an unknown class": (["data._target_=tests.datasets.Pears"], 2, "has no Pears: did you mean 'Pairs'?"),
    "too few items": (["data._target_=tests.datasets.Pairs", "data.count=4"], 2, "is more than the 4 training rows"),
    "no readable image": (["data._target_=tests.datasets.Nowhere"], 3, "data.train: none of 20 images sampled from tests.datasets.Nowhere can be read"),
    "an invalid item": (["data._target_=tests.datasets.Numbers"], 3, "tests.datasets.Numbers[0] returned a value of type int, but an item must be"),
    "an invalid validation item": (
        ["data._target_=tests.datasets.Pairs", "data.val={_target_: tests.datasets.Numbers}"], 3, "tests.datasets.Numbers[0] returned a value",
    ),
    "a metric of labels that do not exist": (
        ["data._target_=tests.datasets.Pairs", "data.count=128", "data.val={_target_: tests.datasets.Unlabeled}", "monitor=val/top1"], 2,
        "monitor=val/top1 is not measured, because the validation data has no labels: give a Dataset the attribute `classes`",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_dataset_that_cannot_work_is_refused_before_a_run_folder_exists(
    case: str, refused: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CLIP_EXP_ALLOWED_TARGETS", raising=False)
    options, code, message = REFUSED[case]
    result = refused("train.py", "model=vit_nano", "data=custom", *options, "trainer.accelerator=cpu", cwd=tmp_path)
    assert result.returncode == code, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "outputs").exists()


def test_an_exception_of_the_users_code_ends_the_run_with_3_and_its_line(command: Run, tmp_path: Path) -> None:
    options = (
        *(o for o in RUN if not o.startswith(("data.", "val_", "max_steps"))),
        "data.num_workers=2",
        "max_steps=30",
    )
    result = command(
        "train.py",
        *options,
        "data._target_=tests.datasets.Failing",
        "data.error=value",
        "data.count=400",
        "data.every=97",  # not among the items that are sampled before the run
        f"output_dir={tmp_path}",
        cwd=tmp_path,
    )
    assert result.returncode == 3, result.stdout + result.stderr
    assert "] failed: ValueError: no such row (datasets.py, line " in result.stderr
    assert "Traceback" not in result.stderr
    (folder,) = run_folders(tmp_path)
    assert json.loads((folder / "run.json").read_text())["exit_code"] == 3


def test_check_data_says_that_it_reads_tables(refused: Run, tmp_path: Path) -> None:
    result = refused(DOOR, "check-data", "data=custom", "data._target_=tests.datasets.Pairs", cwd=tmp_path)
    assert result.returncode == 2
    assert "data._target_ names a Dataset, but check-data reads tables" in result.stderr
    result = refused(
        DOOR, "check-data", "data.train=pairs.csv", "data.val={_target_: tests.datasets.Pairs}", cwd=tmp_path
    )
    assert "data.val names a Dataset, but check-data reads tables" in result.stderr


def test_a_task_on_the_validation_data_says_that_it_reads_tables(whole: Finished, command: Run, tmp_path: Path) -> None:
    result = command("evaluate.py", f"run={whole.folder}", "task=auto", "allow_targets=[tests]", cwd=tmp_path)
    assert result.returncode == 2, result.stdout + result.stderr
    assert "the run was validated on the Dataset tests.datasets.Pairs, but tasks read tables" in result.stderr
