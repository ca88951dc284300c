"""Tests of the command `clip-exp export` and of its output folder, which is written atomically."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

import clip_exp
from clip_exp.errors import CheckpointError, ConfigError
from clip_exp.export import open_clip as open_clip_format
from clip_exp.export import write as writing
from clip_exp.export.folder import whole_folder
from clip_exp.inference.pipeline import Pipeline
from clip_exp.models.clip import CLIP
from tests.conftest import DOOR, Run


@pytest.fixture
def run(command: Run) -> Callable[..., subprocess.CompletedProcess[str]]:
    return partial(command, DOOR, "export")


def test_a_run_is_exported_and_verified(run: Callable, run_dir: Path, nano: CLIP, tmp_path: Path) -> None:
    done = run(f"run={run_dir}", "format=safetensors", "output=exports/nano", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "written: exports/nano (safetensors, 14.0 MB)" in done.stdout
    assert "differ by at most 0.0e+00" in done.stdout
    assert sorted(path.name for path in (tmp_path / "exports" / "nano").iterdir()) == ["README.md", "model.safetensors"]
    assert [path.name for path in (tmp_path / "exports").iterdir()] == ["nano"]
    clip = clip_exp.load(tmp_path / "exports" / "nano", accelerator="cpu")
    assert all(torch.equal(clip.model.state_dict()[name], value) for name, value in nano.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "code", "messages"),
    [
        (["output=out"], 2, ["the model must be set by exactly one of"]),
        (["run={run}"], 2, ["output has no value: set the folder to write (output=DIR)"]),
        (["run={run}", "output=out", "format=gguf"], 2, ["open_clip", "huggingface", "safetensors", "onnx"]),
        (["run={run}", "outptu=out"], 2, ["did you mean 'output'"]),
        (["run=nowhere", "output=full"], 2, ["run=nowhere: folder not found", "output=full is not empty"]),
        (["run={run}", "output=full", "overwrite=true"], 2, ["was not written by clip-exp export", "is not replaced"]),
        (["run={run}", "output=full/file"], 2, ["output=full/file is a file"]),
        (["run={run}", "output=full/file/below"], 4, ["full/file/below cannot be written"]),
        (
            ["model=rn50", "pretrained=openai", "output=o", "format=huggingface"],
            2,
            ["kind=resnet", "Supported formats"],
        ),
    ],
)
def test_errors_are_one_message_and_nothing_is_written(
    refused: Run, arguments: list[str], code: int, messages: list[str], run_dir: Path, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    (work / "full").mkdir(parents=True)
    (work / "full" / "file").write_text("mine")
    done = refused(DOOR, "export", *(argument.format(run=run_dir) for argument in arguments), cwd=work)
    assert done.returncode == code, done.stdout + done.stderr
    assert all(message in done.stderr for message in messages), done.stderr
    assert sorted(path.name for path in work.rglob("*")) == ["file", "full"]
    assert (work / "full" / "file").read_text() == "mine"


@pytest.fixture
def clip(run_dir: Path) -> Pipeline:
    return clip_exp.load(run_dir, accelerator="cpu")


def test_an_older_export_is_replaced_only_with_overwrite(clip: Pipeline, tmp_path: Path) -> None:
    target = clip.export(tmp_path / "exported", "safetensors")
    with pytest.raises(
        ConfigError, match="is not empty: give a new folder, or replace an older export with overwrite=true"
    ):
        clip.export(target)
    assert (target / "model.safetensors").is_file()
    clip.export(target, overwrite=True)
    assert (target / "open_clip_config.json").is_file()
    assert not (target / "model.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_an_empty_folder_is_accepted(clip: Pipeline, tmp_path: Path) -> None:
    (tmp_path / "exported").mkdir()
    assert clip.export(tmp_path / "exported", "safetensors") == tmp_path / "exported"


def test_a_link_is_retained_and_its_target_is_written(clip: Pipeline, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    for name, aim in (("link", "real"), ("to nothing yet", "new")):
        (tmp_path / name).symlink_to(aim)
        for overwrite in (False, True):
            clip.export(tmp_path / name, "safetensors", overwrite)
            assert (tmp_path / name).is_symlink()
            assert (tmp_path / aim / "model.safetensors").is_file()
        assert f'clip_exp.load("{name}")' in (tmp_path / aim / "README.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "new", "real", "run", "to nothing yet"]


def test_an_unknown_format_is_reported_by_the_python_function(clip: Pipeline, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="format=gguf must be one of open_clip, huggingface, safetensors, onnx"):
        clip.export(tmp_path / "exported", "gguf")


def test_files_that_give_other_features_never_appear(
    clip: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a disk error or an unsupported feature of a format; here, the activation gets lost."""
    right = open_clip_format.model_cfg
    monkeypatch.setattr(open_clip_format, "model_cfg", lambda *of: {**right(*of), "quick_gelu": True})
    before = sorted(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match="differ from the model's by"):
        clip.export(tmp_path / "exported")
    assert sorted(tmp_path.iterdir()) == before


def test_an_interrupted_export_leaves_nothing_and_what_was_there(
    clip: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip.export(tmp_path / "exported", "safetensors")
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(writing, "write_card", interrupted)
    with pytest.raises(KeyboardInterrupt):
        clip.export(tmp_path / "exported", "huggingface", overwrite=True)
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before


def test_a_terminated_command_leaves_nothing(run_dir: Path, tmp_path: Path) -> None:
    """The process receives SIGTERM during the export: `write_card` sends it."""
    code = (
        "import os, signal\n"
        "from clip_exp.export import write\n"
        f"write.write_card = lambda *of: os.kill(os.getpid(), {int(signal.SIGTERM)})\n"
        "from clip_exp.cli import run\n"
        f"raise SystemExit(run('export', ['run={run_dir}', 'output=exported', 'format=safetensors']))"
    )
    work = tmp_path / "work"
    work.mkdir()
    done = subprocess.run([sys.executable, "-c", code], cwd=work, capture_output=True, text=True, timeout=120)
    assert done.returncode == 143, done.stderr
    assert "stopped by SIGTERM. Nothing was written." in done.stderr
    assert list(work.iterdir()) == []


def test_a_full_disk_is_reported_and_the_folder_is_unchanged(tmp_path: Path) -> None:
    target = tmp_path / "exported"
    target.mkdir()

    def fill() -> None:
        with whole_folder(target) as folder:
            (folder / "weights").write_text("half")
            raise OSError(28, os.strerror(28))

    with pytest.raises(CheckpointError, match="cannot be written: No space left on device"):
        fill()
    assert list(tmp_path.rglob("*")) == [target]
