"""Tests of `--help`: the overview, and the descriptions of groups, options and keys."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from clip_exp.config.commands import SCHEMAS
from clip_exp.config.describe import keys_of, sections
from clip_exp.config.files import options
from clip_exp.config.help import split_topics
from clip_exp.config.registry import FOLDERS
from tests.conftest import DOOR, REPOSITORY, Run
from tests.keys import leaf_keys

TRAIN, EVALUATE = "train.py", "evaluate.py"


@pytest.mark.parametrize("command", SCHEMAS)
def test_every_key_and_every_node_has_a_meaning_and_a_type(command: str) -> None:
    schema = SCHEMAS[command]
    assert [key.name for key in keys_of(schema) if not key.meaning or not key.type] == []
    assert [section.at for section in sections(schema) if not section.only and not section.meaning] == []
    assert [section.at for section in sections(schema) if not all(section.choices.values())] == []


@pytest.mark.parametrize("command", SCHEMAS)
def test_every_key_of_the_schema_is_described(command: str) -> None:
    described = {key.name.replace(".<name>", "") for key in keys_of(SCHEMAS[command])}
    assert set(leaf_keys(SCHEMAS[command])) - described == set()


def test_types_and_defaults_are_those_of_the_fields() -> None:
    keys = {key.name: key for key in keys_of(SCHEMAS["train"])}
    assert keys["max_steps"][1:3] == ("integer ≥ 1 or null", "null")
    assert keys["data.num_workers"].type == "integer ≥ 0 and ≤ 4096 or null"
    assert keys["model.dropout"][1:3] == ("number ≥ 0 and < 1", "0")
    assert keys["data.val"].type == "path, mapping, list of paths or mappings or null"
    assert keys["data.captions"][1:3] == ("random, all", "random")
    assert keys["model.embed_dim"].default is None
    assert keys["loss.name"].type == "custom, sigmoid, softmax"
    assert keys["patience"].no_effect == ("without a metric to monitor",)


def test_the_overview_fits_the_terminal_with_a_line_per_key(
    refused: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    done = refused(TRAIN, "--help", cwd=tmp_path)
    lines = done.stdout.splitlines()
    assert done.returncode == 0
    assert lines[0].startswith("python train.py [key=value …]")
    assert [line for line in lines if len(line) > 80] == []
    for key, meaning in (("max_steps", "length of the run"), ("  lr", "peak learning rate"), ("model", "Dual encoder")):
        assert len([line for line in lines if re.match(rf"{key}:.* # {meaning}", line)]) == 1
    # What a newcomer sets first stands above the keys of the groups.
    assert done.stdout.index("\nmax_steps:") < done.stdout.index("\nmodel:  ")


def test_the_overview_is_complete_without_a_terminal(
    refused: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert "; the last step is always validated\n" in refused(TRAIN, "--help", cwd=tmp_path).stdout


@pytest.mark.parametrize("arguments", [("--help", "data"), ("--help=data",), ("data", "--help"), ("-h", "data/")])
def test_a_group_is_explained_with_its_options_and_keys(
    arguments: tuple[str, ...], refused: Run, tmp_path: Path
) -> None:
    done = refused(TRAIN, *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for option in options("data", custom=False):
        assert re.search(rf"^  {option} +[A-Z]\w+", done.stdout, re.M), option
    assert re.search(r"data\.captions=random +random, all\n +random: each image once per epoch", done.stdout)
    assert re.search(r"data\.label_key=null +text or null\n.*\n.*\n +No effect without validation data", done.stdout)
    assert "Keys of data.augmentation:" in done.stdout
    assert "Options of data/augmentation: clip, flip, strong" in done.stdout
    assert "optimizer" not in done.stdout


def test_all_members_of_a_union_are_explained(refused: Run, tmp_path: Path) -> None:
    shown = refused(TRAIN, "--help", "loss", "optimizer", cwd=tmp_path).stdout
    assert re.search(r"loss\.chunk_size=1024 +integer ≥ 1", shown)
    assert "Keys of loss with name=sigmoid:" in shown
    assert re.search(r"Keys of optimizer with _target_=torch\.optim\.SGD:\n  optimizer\.lr=0\.1 ", shown)
    tasks = refused(EVALUATE, "--help", "task", cwd=tmp_path).stdout
    for kind in ("retrieval", "zero_shot", "knn", "linear_probe", "robustness"):
        assert re.search(rf"^  kind={kind} +[A-Z]", tasks, re.M)
    assert "task.<name>.train.root=null" in tasks


def test_an_option_is_explained_with_its_values_and_for_a_task_with_the_keys_of_its_kind(
    refused: Run, tmp_path: Path
) -> None:
    shown = refused(EVALUATE, "--help", "task.knn", cwd=tmp_path).stdout
    assert "# k-nearest-neighbor classification by cosine similarity" in shown
    for key in ("task.knn.k=20", "task.knn.root=null", "task.knn.train.root=null", "task.knn.train.generate.seed=0"):
        assert f"  {key} " in shown
    assert "No effect without task.knn.train.table." in shown
    assert "task.knn.max_iter" not in shown
    assert "<name>" not in shown
    assert "_target_: torch.optim.SGD" in refused(TRAIN, "--help", "optimizer.sgd", cwd=tmp_path).stdout


def test_a_member_that_is_no_option_is_explained(refused: Run, tmp_path: Path) -> None:
    shown = refused(TRAIN, "--help", "model.image.resnet", cwd=tmp_path).stdout
    assert "model.image.stages (required)" in shown
    assert "model.image.patch_size" not in shown


def test_a_key_is_explained_by_its_full_name_or_its_last_part(refused: Run, tmp_path: Path) -> None:
    shown = refused(TRAIN, "--help", "lr", cwd=tmp_path).stdout
    assert shown == refused(TRAIN, "--help", "optimizer.lr", cwd=tmp_path).stdout
    assert re.search(r"optimizer\.lr=0\.1 +number > 0, with _target_=torch\.optim\.SGD\n +peak learning rate", shown)


def test_recipes_are_listed_with_their_first_comment(refused: Run, tmp_path: Path) -> None:
    shown = refused(TRAIN, "--help", "experiment", cwd=tmp_path).stdout
    assert re.search(r"^  digits +A CLIP model with 3\.5 million parameters", shown, re.M)


def test_an_unknown_topic_is_answered_with_the_nearest(refused: Run, tmp_path: Path) -> None:
    done = refused(TRAIN, "--help", "optimiser", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == (
        "error: --help optimiser: there is no group or key optimiser in train: did you mean 'optimizer'?\n"
    )


def test_options_and_members_of_ones_own_folder_are_explained(
    refused: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDERS, "")
    folder = tmp_path / "mine" / "loss"
    folder.mkdir(parents=True)
    (folder / "focal.yaml").write_text("# Focal loss\nname: focal\n")
    (folder / "focal.py").write_text(
        "from typing import Literal\nfrom pydantic import Field\nfrom clip_exp.config.training import LossConfig\n"
        'class FocalConfig(LossConfig):\n    """Loss of hard pairs."""\n    name: Literal["focal"] = "focal"\n'
        '    gamma: float = Field(2.0, description="exponent of the difficulty")\n'
    )
    done = refused(TRAIN, "--config-dir", "mine", "--help", "loss", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^  focal +Focal loss$", done.stdout, re.M)
    assert re.search(r"loss\.gamma=2 +number\n +exponent of the difficulty", done.stdout)


@pytest.mark.parametrize(
    ("arguments", "topics", "rest"),
    [
        (["--help", "data", "model=vit_b32"], ["data"], ["--help", "model=vit_b32"]),
        (["--config-dir", "mine", "--help=loss"], ["loss"], ["--config-dir", "mine", "--help"]),
        (["convert.pt"], [], ["convert.pt"]),
        (["--help", "--cfg", "job"], [], ["--help", "--cfg", "job"]),
        (["~data", "--help"], [], ["~data", "--help"]),
    ],
)
def test_topics_are_told_from_overrides_and_values_of_flags(
    arguments: list[str], topics: list[str], rest: list[str]
) -> None:
    assert split_topics(arguments) == (topics, rest)


def test_help_of_a_group_needs_neither_torch_nor_lightning(tmp_path: Path) -> None:
    code = (
        "import sys; from clip_exp import cli; cli.run('train', ['--help', 'data'])\n"
        "print([name for name in ('torch', 'pytorch_lightning') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_help_of_other_commands_explains_keys(refused: Run, tmp_path: Path) -> None:
    assert "images=null" in refused(DOOR, "predict", "--help", "images", cwd=tmp_path).stdout
    # The positional argument of the command is a topic here.
    assert refused(DOOR, "convert", "--help", "file", cwd=tmp_path).stdout.startswith("  file=null ")
