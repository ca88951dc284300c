"""`python evaluate.py` as a user runs it: exit codes and messages."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.small_runs import write_image


def test_a_run_is_evaluated_from_another_folder(run_dir: Path, class_folders: Path, tmp_path: Path, command: Callable):
    done = command(
        "evaluate.py",
        f"run={run_dir}",
        "task=image_folder",
        f"task.image_folder.root={class_folders}",
        "task.image_folder.templates=simple",
        "num_workers=0",
        "accelerator=cpu",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "image_folder/top1" in done.stdout
    result = json.loads((run_dir / "eval" / "image_folder.json").read_text())
    assert result["protocol"]["templates"] == 7


@pytest.mark.parametrize(
    ("overrides", "code", "message"),
    [
        (["run={run}", "task=image_folder"], 2, "task.image_folder.root has no value"),
        (["run={run}", "task=image_folder", "task.image_folder.root=absent"], 2, "root=absent: no such folder"),
        (["task=image_folder", "task.image_folder.root={images}"], 2, "the model must be set by exactly one of"),
        (
            ["run={run}", "task=imagenet", "task.imagenet.root={images}"],
            3,
            "these labels are not classes of ImageNet-1k: 'n99999999'",
        ),
        (["run={images}", "task=digits"], 4, "is not a run folder"),
        (["run={run}", "task=[digits,imagnet]"], 2, "task=imagnet does not exist: did you mean 'imagenet'?"),
        (["run={run}", "task.imagnet.root={images}"], 2, "task.imagnet is not selected: did you mean 'imagenet'?"),
    ],
)
def test_errors_are_one_message_with_their_exit_code(
    run_dir: Path, tmp_path: Path, refused: Callable, overrides: list[str], code: int, message: str
):
    write_image(tmp_path / "images" / "n99999999" / "1.png", 0)
    places = {"run": run_dir, "images": tmp_path / "images"}
    done = refused("evaluate.py", *(override.format(**places) for override in overrides), cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert message in done.stderr


def test_the_help_of_chosen_tasks_has_their_keys_and_meanings(tmp_path: Path, refused: Callable):
    done = refused(
        "evaluate.py", "task=[knn,robustness]", "task.robustness.sets.imagenet.root=x", "--help", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    lines = [re.sub(r" +#", "  #", line) for line in done.stdout.splitlines()]
    assert "  knn:" in lines
    assert "    k: 20  # neighbors that vote" in lines
    assert any(line.startswith("      imagenet:") for line in lines)
    assert any(line.startswith("        root: x  # folder with a folder of images per class") for line in lines)
