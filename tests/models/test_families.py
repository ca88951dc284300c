"""Families of towers: no other package knows their kinds, and one file and one option make a new one."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import clip_exp
from clip_exp.config import registry
from clip_exp.config.model import ImageTowerConfig, TextTowerConfig
from tests.conftest import DOOR, REPOSITORY, Run

PACKAGE = Path(clip_exp.__file__).parent
FAMILIES = "clip_exp.models.families"
GENERAL = f"{FAMILIES}.published"  # what is known of pairs of towers, for those who read and write whole models
NAMES_OF_OTHER_THINGS = {"clip", "custom", "open_clip", "huggingface", "timm"}  # a model, libraries, formats

BLOCK = re.compile(r"```(?:python|yaml)\n# mine/(\S+)\n(.*?)```", re.DOTALL)


def mentions(tree: ast.Module) -> Iterator[str]:
    """Yield what in a module names a kind of tower: imports of a family, its classes, comparisons with and tables of kinds."""
    kinds = {
        base.registered[name].__name__: name for base in (ImageTowerConfig, TextTowerConfig) for name in base.registered
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith(FAMILIES) and node.module != GENERAL:
            yield f"imports {node.module}"
        elif isinstance(node, ast.Name | ast.Attribute) and getattr(node, "id", getattr(node, "attr", "")) in kinds:
            yield f"names {ast.unparse(node)}"
        elif isinstance(node, ast.Constant) and node.value in {*kinds.values()} - NAMES_OF_OTHER_THINGS:
            yield f"has {node.value!r}"
        elif (
            isinstance(node, ast.Compare)
            and (tower := ast.unparse(node.left)).endswith((".image.kind", ".text.kind", "tower.kind"))
            and any(isinstance(other, ast.Constant) for other in node.comparators)
        ):
            yield f"compares {tower}"


def test_no_file_outside_the_families_names_a_kind_of_tower() -> None:
    assert {"vit", "resnet", "siglip", "timm", "open_clip"} <= {
        of.model_fields["kind"].default for of in ImageTowerConfig.members()
    }
    assert {"clip", "siglip", "huggingface", "open_clip"} <= {
        of.model_fields["kind"].default for of in TextTowerConfig.members()
    }
    found = {
        str(file.relative_to(PACKAGE)): list(mentions(ast.parse(file.read_text(encoding="utf-8"))))
        for file in PACKAGE.rglob("*.py")
        if "families" not in file.parts and file.name != "words.py"  # which has the names of other frameworks
    }
    assert {name: what for name, what in found.items() if what} == {}


def test_the_search_for_kinds_finds_them() -> None:
    tree = ast.parse(
        'from clip_exp.models.families.clip import ViTConfig\nx = m.image.kind == "timm"\ny = isinstance(t, ViTConfig)\nz = "vit"'
    )
    assert len(list(mentions(tree))) == 4


@pytest.fixture
def config_dir(tmp_path: Path) -> Path:
    """The folder of the page."""
    page = (REPOSITORY / "docs/models.md").read_text(encoding="utf-8")
    for name, text in BLOCK.findall(page):
        (tmp_path / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mine" / name).write_text(text)
    return tmp_path / "mine"


def words(config_dir: Path, *more: str) -> list[str]:
    return ["--config-dir", str(config_dir), *more]


SHORT = (
    "model=vit_nano",
    "model/image=pool",
    "data=digits",
    "max_steps=3",
    "global_batch_size=16",
    "data.num_workers=1",
)


def test_a_family_is_one_file_and_one_option(config_dir: Path, tmp_path: Path, command: Run) -> None:
    """In one process, in ranks, in an evaluation and in an export."""
    for devices in (1, 2):
        result = command(
            "train.py", *words(config_dir, *SHORT, f"trainer.devices={devices}", f"name=on{devices}"), cwd=tmp_path
        )
        assert result.returncode == 0, result.stderr
        trained = result
    (run,) = (tmp_path / "outputs/train/on2").iterdir()
    assert "kind: pool" in (run / "config.yaml").read_text()
    result = command("evaluate.py", *words(config_dir, f"run={run}"), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert json.loads((run / "eval/val_zero_shot.json").read_text())["metrics"]
    result = command(DOOR, "export", *words(config_dir, f"run={run}", "format=safetensors", "output=out"), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    without = command("evaluate.py", f"run={run}", cwd=tmp_path)
    assert without.returncode == 2
    assert "model.image.kind=pool" in without.stderr
    assert "--config-dir" in without.stderr
    assert "another version" not in without.stderr
    assert f" --config-dir {config_dir} run=" in trained.stdout, "the next command"
    code = f"import clip_exp; print(clip_exp.load({str(run)!r}, accelerator='cpu').config.image.kind)"
    environment = {**os.environ, registry.FOLDERS: str(config_dir)}
    loaded = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert loaded.stdout == "pool\n", loaded.stderr


def test_a_model_of_a_family_is_trained_loaded_and_exported_in_python(config_dir: Path, tmp_path: Path) -> None:
    """In a process of its own, since a process keeps the classes that it has imported."""
    words = [*SHORT, "trainer.accelerator=cpu", f"output_dir={tmp_path}"]
    code = (
        "import os, clip_exp\n"
        f"run = clip_exp.train(*{words!r}, config_dir='mine')\n"
        "clip = clip_exp.load(run, accelerator='cpu', config_dir='mine')\n"
        "clip.export('out', format='safetensors')\n"
        "again = clip_exp.load('out', accelerator='cpu', config_dir=['mine'])\n"
        "print((again.encode_text('a dog') - clip.encode_text('a dog')).abs().max().item())\n"
        f"assert {registry.FOLDERS!r} not in os.environ\n"
        "clip_exp.load(run, accelerator='cpu')\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != registry.FOLDERS}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "0.0", done.stderr
    assert "model.image.kind=pool must be one of" in done.stderr.splitlines()[-1], "without the folder"


def test_a_mistyped_key_of_a_family_is_refused_with_its_full_name(
    config_dir: Path, tmp_path: Path, command: Run
) -> None:
    result = command("train.py", *words(config_dir, *SHORT, "model.image.chanels=8"), cwd=tmp_path)
    assert result.returncode == 2
    assert "model.image.chanels does not exist: did you mean 'model.image.channels'?" in result.stderr
    result = command("train.py", *words(config_dir, *SHORT, "model.image.channels=none"), cwd=tmp_path)
    assert "model.image.channels=none must be an integer." in result.stderr
    assert not (tmp_path / "outputs").exists()


def test_code_in_a_run_folder_is_not_run(config_dir: Path, tmp_path: Path, command: Run) -> None:
    """`--config-dir RUN --config-name config` repeats a run, which may be a third party's."""
    (config_dir / "run.json").write_text("{}")
    (config_dir / "model/image/pool.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    result = command("train.py", *words(config_dir, *SHORT), cwd=tmp_path)
    assert result.returncode == 2
    assert not (tmp_path / "ran").exists()


SUBCLASS = """from typing import Literal

from clip_exp.models.families.clip import ViTConfig


class MyViTConfig(ViTConfig):
    kind: Literal["myvit"] = "myvit"
"""


def test_a_kind_that_extends_a_built_in_one_takes_nothing_over(config_dir: Path, tmp_path: Path, command: Run) -> None:
    (config_dir / "model/image/pool.py").write_text(SUBCLASS)
    result = command("train.py", *words(config_dir, "--cfg", "job", "model=vit_nano"), cwd=tmp_path)
    assert "kind: vit\n" in result.stdout


def test_two_files_that_declare_one_kind_are_named(config_dir: Path, tmp_path: Path, command: Run) -> None:
    (config_dir / "model/image/other.py").write_text((config_dir / "model/image/pool.py").read_text())
    result = command("train.py", *words(config_dir, *SHORT), cwd=tmp_path)
    assert result.returncode == 2
    assert "other.py" in result.stderr
    assert "pool.py both declare kind=pool. Rename one of them." in result.stderr


def test_a_repeated_run_runs_no_code(config_dir: Path, tmp_path: Path, command: Run) -> None:
    (config_dir / "model/image/pool.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (config_dir / "config.yaml").write_text("defaults: [train, _self_]\n")
    for given in (("--config-name", "config"), ()):
        result = command("train.py", *words(config_dir, *given, *SHORT), cwd=tmp_path)
        assert result.returncode == 2
        assert not (tmp_path / "ran").exists()
    assert "is not imported, since" in result.stderr


def test_files_of_one_name_in_two_folders_do_not_meet(config_dir: Path, tmp_path: Path, command: Run) -> None:
    other = tmp_path / "other"
    shutil.copytree(config_dir, other)
    result = command("train.py", *words(config_dir, *SHORT), cwd=tmp_path, CLIP_EXP_CONFIG_DIR=str(other))
    assert result.returncode == 2
    assert "both declare kind=pool. Rename one of them." in result.stderr


def test_a_path_that_cannot_be_listed_is_refused(config_dir: Path, tmp_path: Path, command: Run) -> None:
    shutil.copytree(config_dir, tmp_path / "mi:ne")
    result = command("train.py", *words(tmp_path / "mi:ne", *SHORT), cwd=tmp_path)
    assert result.returncode == 2
    assert "Rename the folder" in result.stderr


def test_a_helper_next_to_a_member_is_not_taken_for_one(config_dir: Path, tmp_path: Path, command: Run) -> None:
    (config_dir / "model/image/_helper.py").write_text("raise RuntimeError")
    result = command("train.py", *words(config_dir, "--cfg", "job", *SHORT), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
