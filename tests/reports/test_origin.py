"""The commands that are printed to be typed next exist where they are printed, and do what they say."""

import os
import re
import shutil
import subprocess
import sys
from html import unescape
from pathlib import Path

import pytest

from clip_exp.reports import origin
from clip_exp.reports.origin import command_line
from tests.conftest import REPOSITORY
from tests.runs import TINY, Train, run_folders

INSTALLED = str(Path(sys.executable).parent)


def type_in(folder: Path, line: str) -> subprocess.CompletedProcess[str]:
    path = {"PATH": f"{INSTALLED}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        line, shell=True, cwd=folder, env={**os.environ, **path}, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize(
    ("where", "program", "begins"),
    [
        ("checkout", None, "{python} evaluate.py"),
        ("elsewhere", f"{INSTALLED}/clip-exp", "clip-exp evaluate"),
        ("elsewhere", "/usr/local/bin/clip-exp", "{python} {checkout}/evaluate.py"),  # of another interpreter
        ("elsewhere without a checkout", None, "{python} -m clip_exp evaluate"),
    ],
)
def test_a_command_exists_where_it_is_printed(
    where: str, program: str | None, begins: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = REPOSITORY if where == "checkout" else tmp_path
    monkeypatch.chdir(folder)
    monkeypatch.setattr(shutil, "which", lambda name: program if name == "clip-exp" else None)
    if where.endswith("without a checkout"):
        monkeypatch.setattr(origin, "CHECKOUT", tmp_path / "site-packages")
    line = command_line("evaluate", ["--help"])
    interpreter = Path(sys.executable)
    python = interpreter.relative_to(folder) if interpreter.is_relative_to(folder) else interpreter
    assert line == begins.format(python=python, checkout=REPOSITORY) + " --help"
    assert type_in(folder, line).returncode == 0


@pytest.mark.exhaustive
def test_the_commands_of_a_report_train_again_and_score(train: Train, tmp_path: Path) -> None:
    finished = train(*TINY, "max_steps=2", "trainer.devices=1", output_dir=tmp_path)
    page = (finished.folder / "report.html").read_text(encoding="utf-8")
    section = page[page.index("The run once more") :]
    again, score = unescape(re.search(r"<pre>(.*?)</pre>", section, re.DOTALL)[1]).splitlines()  # type: ignore[index]
    assert score in finished.output
    for line in (again, score):
        done = type_in(tmp_path, line)
        assert done.returncode == 0, (line, done.stderr)
    assert len(run_folders(tmp_path)) == 2
    assert len(list(tmp_path.glob("**/evaluate/*/*/eval"))) == 1
