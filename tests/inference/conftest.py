import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import clip_exp
from clip_exp.inference.pipeline import Pipeline
from tests.conftest import DOOR, Run
from tests.small_runs import nano, run_dir, write_image

__all__ = ["nano", "run_dir"]


@pytest.fixture
def clip(run_dir: Path) -> Pipeline:
    return clip_exp.load(run_dir, accelerator="cpu")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Return a folder with seven images, two of them in a subfolder, and other files."""
    folder = tmp_path / "photos"
    for number in range(5):
        write_image(folder / f"{number}.png", number)
    for number in range(5, 7):
        write_image(folder / "more" / f"{number}.png", number)
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.png").write_text("no image")
    return folder


@pytest.fixture
def clip_exp_command(tmp_path: Path, command: Run) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `clip-exp <arguments>` in `tmp_path`, on the CPU, with one process."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return command(DOOR, *arguments, "num_workers=0", "accelerator=cpu", cwd=tmp_path)

    return run
