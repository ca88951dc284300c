"""Code that a file from a third party names is never run unless the user allows it: seen by a canary that importing it would leave."""

import copy
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors import safe_open
from safetensors.torch import save_file

import clip_exp
from clip_exp.checkpoints.folders import latest
from clip_exp.config.targets import ALLOWED, TargetNotAllowedError, instantiate
from clip_exp.errors import ClipExpError
from clip_exp.models.clip import CLIP
from tests.conftest import DOOR, Run
from tests.runs import run_folders
from tests.small_runs import nano, write_image, write_run

__all__ = ["nano"]
FOREIGN = {"_target_": "canary.Thing"}
# Key in config.yaml, and the node there, of everything that may name code
KINDS: dict[str, dict[str, Any]] = {
    "loss": FOREIGN,
    "model.image": {**FOREIGN, "image_size": 32},
    "model.text": FOREIGN,
    "data": {**FOREIGN, "name": "custom"},
    "data.val": FOREIGN,
    "data.transform": FOREIGN,
    "optimizer": {**FOREIGN, "lr": 0.1},
    "scheduler": FOREIGN,
    "callbacks.extra": {"a": FOREIGN},
    "logger.extra": {"a": FOREIGN},
    "task": {"a": FOREIGN},
    "loss, nested in an argument": {"_target_": "torch.nn.Identity", "inner": {"_target_": "torch.nn.Identity", "x": FOREIGN}},
    "loss, nested in a list": {"_target_": "torch.nn.Sequential", "_args_": [[{"a": FOREIGN}]]},
    "model.image, nested": {"_target_": "torch.nn.Sequential", "_args_": [FOREIGN], "image_size": 32},
}  # fmt: skip


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, in which a module is found that leaves a canary when it is imported."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "canary.py").write_text("open('canary-died', 'w').close()\nclass Thing: pass\n")
    write_image(tmp_path / "image.png", 0)
    return tmp_path


def foreign_run(here: Path, nano: CLIP, kind: str, **more: Any) -> Path:
    """A run of a third party whose configuration names its code."""
    folder = write_run(here / "run", nano)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    *groups, key = kind.partition(",")[0].split(".")
    inner = config
    for group in groups:
        inner = inner[group]
    inner[key] = copy.deepcopy(KINDS[kind])
    (folder / "config.yaml").write_text(yaml.safe_dump({**config, **more}))
    return folder


def commands(run: Path) -> dict[str, tuple[str, ...]]:
    """Commands that read the configuration of a run, as a script and its arguments."""
    weights = latest(run) / "model.safetensors"
    return {
        "evaluate run=": ("evaluate.py", f"run={run}", "task=digits"),
        "evaluate ckpt=": ("evaluate.py", f"ckpt={weights}", "task=digits"),
        "export": (DOOR, "export", f"run={run}", "format=safetensors", "output=exported"),
        "predict": (DOOR, "predict", f"run={run}", "images=image.png", "texts=[a,b]"),
        "train from its config.yaml": ("train.py", "--config-dir", str(run), "--config-name", "config"),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_names_code_is_refused_by_every_command(kind: str, here: Path, nano: CLIP, refused: Run) -> None:
    """Its own `allow_targets` does not help."""
    run = foreign_run(here, nano, kind, allow_targets=["canary"])
    for name, words in commands(run).items():
        result = refused(*words, cwd=here)
        assert result.returncode == 2, (name, result.stdout, result.stderr)
        assert "names custom code, which runs only if it is allowed" in result.stderr, name
        assert "_target_=canary.Thing" in result.stderr, name
        assert "Traceback" not in result.stderr
        (line,) = (line.strip() for line in result.stderr.splitlines() if "allow_targets=[canary]'" in line)
        at = "--config-name" if name.startswith("train") else words[-1]
        assert {at, "allow_targets=[canary]"} <= {*shlex.split(line)}, line
    for source in (run, latest(run), latest(run) / "model.safetensors"):
        with pytest.raises(TargetNotAllowedError, match=r"_target_=canary\.Thing.*allow_targets=\[canary\]"):
            clip_exp.load(source, accelerator="cpu")
    assert not (here / "canary-died").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_names_code_is_neither_resumed_nor_a_start(kind: str, here: Path, nano: CLIP, refused: Run) -> None:
    run = foreign_run(here, nano, kind, allow_targets=["canary"])
    (here / "pairs.csv").write_text("filepath,title\n" + "".join(f"image.png,{i}\n" for i in range(8)))
    plain = (
        "model=vit_nano",
        "data=csv",
        "data.train=pairs.csv",
        "max_steps=1",
        "optimizer.lr=1e-3",
        "global_batch_size=4",
        "data.captions=all",
    )
    resumed = refused("train.py", *plain, f"resume={run}", "trainer.accelerator=cpu", cwd=here)
    assert resumed.returncode in (2, 4), resumed.stderr
    assert "canary" in resumed.stderr or "was trained with other values of" in resumed.stderr
    if kind.startswith("model."):
        for started in (
            refused("train.py", *plain, f"pretrained={run}", "trainer.accelerator=cpu", cwd=here),
            refused("evaluate.py", "model=vit_nano", f"pretrained={run}", "task=digits", cwd=here),
        ):
            assert started.returncode == 2, started.stderr
            assert "_target_=canary.Thing" in started.stderr
    assert not run_folders(here / "outputs")
    assert not (here / "canary-died").exists()


@pytest.mark.parametrize("tower", ["image", "text"])
def test_an_exported_file_that_names_code_is_refused(tower: str, here: Path, nano: CLIP, refused: Run) -> None:
    clip = clip_exp.load(write_run(here / "run", nano), accelerator="cpu")
    file = clip.export(here / "exported", format="safetensors") / "model.safetensors"
    metadata = metadata_of(file)
    (key,) = (key for key, text in metadata.items() if "patch_size" in text)
    model = yaml.safe_load(metadata[key])
    model[tower] = {**KINDS[f"model.{tower}"], "kind": "custom"}
    alone = here / "alone.safetensors"
    save_file(nano.state_dict(), alone, {**metadata, key: json.dumps(model)})
    with pytest.raises(TargetNotAllowedError, match=r"_target_=canary\.Thing"):
        clip_exp.load(alone, accelerator="cpu")
    for words in (
        ("evaluate.py", f"pretrained={alone}", "task=digits"),
        (DOOR, "predict", f"pretrained={alone}", "images=image.png", "texts=[a,b]"),
        (DOOR, "export", f"pretrained={alone}", "format=safetensors", "output=again"),
    ):
        result = refused(*words, cwd=here)
        assert result.returncode == 2, result.stderr
        assert "allow_targets=[canary]'" in result.stderr
    assert not (here / "canary-died").exists()


def metadata_of(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return opened.metadata()


def allows(monkeypatch: pytest.MonkeyPatch, how: str, run: Path) -> Callable[[], object]:
    """Return a call that allows the code of a run in one of the ways."""
    match how:
        case "allow_targets in Python":
            return lambda: clip_exp.load(run, accelerator="cpu", allow_targets=["canary"])
        case "the exact object":
            return lambda: clip_exp.load(run, accelerator="cpu", allow_targets=["canary.Thing"])
        case "the environment":
            monkeypatch.setenv(ALLOWED, "other,canary")
            return lambda: clip_exp.load(run, accelerator="cpu")
    return lambda: clip_exp.evaluate(f"run={run}", "task=digits", how, "num_workers=0", "accelerator=cpu")


@pytest.mark.parametrize(
    "how",
    [
        "allow_targets in Python",
        "the exact object",
        "the environment",
        "allow_targets=[canary]",
        "+task.b={_target_: canary.Thing}",
    ],
)
def test_code_runs_if_the_user_allows_it(how: str, here: Path, nano: CLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tower's module is imported then, and is found not to be one."""
    run = foreign_run(here, nano, "model.image")
    with pytest.raises(ClipExpError) as caught:
        allows(monkeypatch, how, run)()
    assert not isinstance(caught.value, TargetNotAllowedError)
    assert (here / "canary-died").exists()


@pytest.mark.parametrize("given", ["canar", "canary.Thin", "canary.Thing.x", "Thing", "", "*"])
def test_other_names_do_not_allow_it(given: str, here: Path, nano: CLIP) -> None:
    run = foreign_run(here, nano, "loss")
    with pytest.raises(TargetNotAllowedError):
        clip_exp.load(run, accelerator="cpu", allow_targets=[given])
    assert not (here / "canary-died").exists()


@pytest.mark.parametrize(
    "words", [("--config-dir", "run"), ("hydra.searchpath=[run]",)], ids=["config-dir", "searchpath"]
)
def test_an_option_in_a_run_folder_allows_nothing(words: tuple[str, ...], here: Path, nano: CLIP, refused: Run) -> None:
    run = write_run(here / "run", nano)
    (run / "loss").mkdir()
    (run / "loss" / "option.yaml").write_text(
        "# @package _global_\nloss:\n  _target_: canary.Thing\nallow_targets: [canary]\n"
    )
    plain = ("model=vit_nano", "data=digits", "max_steps=1", "optimizer.lr=1e-3", "trainer.accelerator=cpu")
    result = refused("train.py", *words, *plain, "loss=option", cwd=here)
    assert result.returncode == 2, result.stderr
    assert "names custom code, which runs only if it is allowed: loss._target_=canary.Thing" in result.stderr
    assert not (here / "canary-died").exists()


def test_a_run_folder_as_config_dir_of_python_allows_nothing(here: Path, nano: CLIP) -> None:
    run = write_run(here / "run", nano)
    (run / "loss").mkdir()
    (run / "loss" / "option.yaml").write_text("_target_: canary.Thing\n")
    with pytest.raises(TargetNotAllowedError):
        clip_exp.train(
            "model=vit_nano", "data=digits", "loss=option", "max_steps=1", "optimizer.lr=1e-3", config_dir=run
        )
    assert not (here / "canary-died").exists()


def test_what_a_call_allows_is_refused_in_the_next_one(here: Path, nano: CLIP) -> None:
    run = foreign_run(here, nano, "logger.extra")
    clip_exp.evaluate(f"run={run}", "task=digits", "allow_targets=[canary]", "num_workers=0", "accelerator=cpu")
    with pytest.raises(TargetNotAllowedError):
        clip_exp.load(run, accelerator="cpu")
    clip_exp.load(run, accelerator="cpu", allow_targets=["canary"])
    with pytest.raises(TargetNotAllowedError):
        clip_exp.load(run, accelerator="cpu")
    assert not (here / "canary-died").exists()


def test_an_object_deep_inside_an_argument_is_not_created(here: Path) -> None:
    node = {"_target_": "torch.nn.Identity", "x": {"_target_": "torch.nn.Identity", "y": [{"z": FOREIGN}]}}
    with pytest.raises(TargetNotAllowedError, match=r"loss\.x\.y\[0\]\.z\._target_=canary\.Thing"):
        instantiate(node, "loss")
    assert not (here / "canary-died").exists()
