"""The blocks of docs/extending.md are files, and its commands train and evaluate with them."""

import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import REPOSITORY, Run
from tests.datasets import pixels
from tests.runs import run_folders

PAGE = (REPOSITORY / "docs" / "extending.md").read_text(encoding="utf-8")
BLOCKS = re.compile(r"```(?:python|yaml)\n# (mine[^\s,]*)[^\n]*\n(.*?)```", re.DOTALL)
COMMANDS = re.findall(r"^(?:\$ )?python (train\.py .*|evaluate\.py .*)$", PAGE, re.MULTILINE)
SMALL = (
    "max_steps=12",
    "global_batch_size=8",
    "data.num_workers=0",
    "trainer.accelerator=cpu",
    "resume=never",
    "model=vit_nano",
)
REFUSED = {"loss.smothing=0.1": "did you mean 'smoothing'", "downloaded": "names custom code"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create the files of the guide, and the data that its commands name."""
    folder = tmp_path_factory.mktemp("guide")
    for name, text in BLOCKS.findall(PAGE):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as target:
            target.write(text)
    for number in range(12):
        photo = folder / "photos" / "train" / str(number)
        photo.mkdir(parents=True)
        Image.fromarray(pixels(number)).save(photo / "photo.jpg")
        (photo / "captions.txt").write_text(f"image {number}\nthe image number {number}\n", encoding="utf-8")
    return folder


def test_the_guide_has_files_and_commands() -> None:
    assert {name for name, _ in BLOCKS.findall(PAGE)} >= {"mine.py", "mine/loss/smooth.yaml", "mine/loss/smoothed.py"}
    assert len([command for command in COMMANDS if command.startswith("train.py")]) >= 12


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("train.py") and "task=hits" not in line])
def test_a_command_of_the_guide_works(line: str, folder: Path, command: Run) -> None:
    script, *words = shlex.split(line)
    words = [word.replace("/photos", str(folder / "photos")) for word in words if word != "model=vit_b32"]
    if "trainer.devices=2" not in words:
        words.append("trainer.devices=1")
    before = run_folders(folder / "outputs")
    done = command(script, *words, *(key for key in SMALL), cwd=folder)
    expected = next((message for part, message in REFUSED.items() if part in line), None)
    if expected is not None:
        assert done.returncode == 2
        assert expected in done.stderr
        assert run_folders(folder / "outputs") == before
        return
    assert done.returncode == 0, done.stderr
    (run,) = set(run_folders(folder / "outputs")) - set(before)
    if "task.spread" in line:
        evaluated = command(
            "evaluate.py",
            f"run={run}",
            "task.spread._target_=mine.Spread",
            "accelerator=cpu",
            "num_workers=0",
            cwd=folder,
        )
        assert evaluated.returncode == 0, evaluated.stderr
        assert "spread/uniformity" in evaluated.stdout
