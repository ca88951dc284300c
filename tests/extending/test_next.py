"""Every command that is printed for a run with a user's code works when it is typed in the same folder."""

import html
import re
import shlex
from pathlib import Path

import pytest

from tests.conftest import DOOR, Run
from tests.extending.common import DIGITS, EXTENDED, SMALL, after, csv_of, only_run, typed, write_pairs
from tests.runs import run_folders, unfinish
from tests.small_runs import write_image

MINE = """
from torch import nn


class Tower(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, width, 8, stride=8), nn.GELU())

    def forward(self, image_BCHW):
        return self.layers(image_BCHW).mean((2, 3))


class Loss(nn.Module):
    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, image_features, text_features, logit_scale):
        return self.weight * (image_features - text_features).square().mean() * logit_scale.sum()
"""
TYPED = (
    *SMALL, *DIGITS, "model/image=custom", "model.image._target_=mine.Tower", "model.image.image_size=32", "loss=custom",
    "loss._target_=mine.Loss", "checkpoint_every_n_steps=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def trained(command: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder in which a run with custom code was trained, and what was printed."""
    here = tmp_path_factory.mktemp("here")
    (here / "mine.py").write_text(MINE)
    write_image(here / "image.png", 0)
    done = command("train.py", *(o for o in TYPED if not o.startswith("resume")), "max_steps=2", cwd=here)
    assert done.returncode == 0, done.stderr
    return here, done.stdout


def assert_works(command: Run, line: str, here: Path, *more: str) -> str:
    done = typed(command, line, here, *more)
    assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    return done.stdout


def in_report(report: Path) -> list[str]:
    """The commands in a report."""
    text = html.unescape(re.sub(r"<[^>]+>", "\n", report.read_text()))
    return [
        line.strip() for line in text.splitlines() if re.search(r"(train|evaluate|clip_exp|clip-exp)\S* .*\w=", line)
    ]


CPU = ("num_workers=0", "accelerator=cpu")
REFUSED = {
    "evaluate run=": ("evaluate.py", "run={run}", "task=digits", *CPU),
    "evaluate ckpt=": ("evaluate.py", "ckpt={run}/checkpoints/step-000002/model.safetensors", "task=digits", *CPU),
    "export": (DOOR, "export", "run={run}", "format=safetensors", "output=exported"),
    "predict": (DOOR, "predict", "run={run}", "images=image.png", "texts=[a,b]", "accelerator=cpu"),
    "evaluate pretrained=": ("evaluate.py", "pretrained=exported", "task=digits", *CPU),
    "train from its config.yaml": ("train.py", "--config-dir", "{run}", "--config-name", "config", "resume=never", "name=again"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_command_prints_the_complete_command_that_works(
    name: str, trained: tuple[Path, str], command: Run, request: pytest.FixtureRequest
) -> None:
    here, _ = trained
    script, *words = (word.format(run=only_one(here)) for word in REFUSED[name])
    if "pretrained=exported" in words and not (here / "exported").exists():
        exported = (DOOR, "export", f"run={only_one(here)}", "format=safetensors", "output=exported")
        assert command(*exported, "allow_targets=[mine]", cwd=here).returncode == 0
    elif name == "export":
        words = [word.replace("exported", "exported-again") for word in words]
    refused = command(script, *words, cwd=here)
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert "names custom code, which runs only if it is allowed" in refused.stderr
    line = refused.stderr.strip().splitlines()[-1]
    assert shlex.split(line)[-1] == "allow_targets=[mine]"
    assert_works(command, line, here)


def test_the_complete_command_has_everything_that_was_typed(trained: tuple[Path, str], command: Run) -> None:
    """What was allowed stays allowed, and flags stay where the command line accepts them."""
    here, _ = trained
    run = only_one(here)
    (here / "options").mkdir(exist_ok=True)
    words = (f"run={run}", "allow_targets=[other]", "task=digits", *CPU, "--config-dir", "options")
    refused = command("evaluate.py", *words, cwd=here)
    line = refused.stderr.strip().splitlines()[-1]
    assert (
        shlex.split(line)[-5:]
        == ["--config-dir", "options", words[0], "task=digits", *CPU, "allow_targets=[other,mine]"][-5:]
    )
    assert line.count("--config-dir") == line.count("allow_targets") == 1
    assert_works(command, line, here)


def only_one(here: Path) -> Path:
    """The trained run, relative to the folder."""
    return next(folder for folder in run_folders(here / "outputs") if "again" not in str(folder)).relative_to(here)


def test_the_next_command_of_training_and_those_in_the_reports_work(trained: tuple[Path, str], command: Run) -> None:
    here, output = trained
    report = here / only_one(here) / "report.html"
    evaluated = assert_works(command, after("next:", output), here, *CPU)
    (line,) = (found for found in in_report(report) if found.endswith("'allow_targets=[mine]'"))
    assert_works(command, line, here, *CPU)
    (again,) = (found for found in in_report(report) if "resume=never" in found)
    assert_works(command, again, here, "name=again")
    reports = [here / path for path in re.findall(r"(outputs/evaluate/\S+\.html)", evaluated)]
    lines = {found for path in reports for found in in_report(path)}
    assert lines
    for found in lines:
        assert_works(command, found, here)


def test_the_same_command_resumes_an_interrupted_run(trained: tuple[Path, str], command: Run) -> None:
    here, _ = trained
    run = only_one(here)
    unfinish(here / run)
    words = (*(o for o in TYPED if not o.startswith("resume")), "max_steps=2")
    for resume in ("resume=auto", f"resume={run}"):
        done = command("train.py", *words, resume, cwd=here)
        assert done.returncode == 0, done.stderr
        assert str(run) in done.stdout


def test_the_commands_of_check_data_work(command: Run, tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs", images=40)
    done = command(
        DOOR,
        "check-data",
        *EXTENDED,
        *csv_of(Path("pairs")),
        "model=vit_nano",
        "model/image=convnet",
        "data.columns=[hard_negative]",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    line = after("Next:", done.stdout)
    small = (option for option in SMALL if not option.startswith("model="))
    output = assert_works(command, line, tmp_path, *small, "loss=hard_negatives", "max_steps=1")
    assert "allow_targets=[convnet,hard_negatives]" in after("next:", output)
    assert only_run(tmp_path)
