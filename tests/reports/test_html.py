"""Parts of every report: printed commands exist and do what they say; thumbnails of images."""

import base64
import os
import re
import shutil
import subprocess
import sys
from html import unescape
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clip_exp.data.files import ImageLimits
from clip_exp.data.image_sets import ImageFiles
from clip_exp.reports import html
from clip_exp.reports.html import SIDE, Thumbnails, command_line
from tests.conftest import REPOSITORY
from tests.runs import TINY, Train, run_folders
from tests.small_runs import write_image

LIMITS = ImageLimits()

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
        monkeypatch.setattr(html, "CHECKOUT", tmp_path / "site-packages")
    line = command_line("evaluate", ["--help"])
    interpreter = Path(sys.executable)
    python = interpreter.relative_to(folder) if interpreter.is_relative_to(folder) else interpreter
    assert line == begins.format(python=python, checkout=REPOSITORY) + " --help"
    assert type_in(folder, line).returncode == 0


@pytest.mark.exhaustive
def test_the_commands_of_a_report_train_again_and_score(train: Train, tmp_path: Path) -> None:
    finished = train(*TINY, "max_steps=2", "trainer.devices=1", output_dir=tmp_path)
    report = (finished.folder / "report.html").read_text(encoding="utf-8")
    section = report[report.index("To train again") :]
    again, score = unescape(re.search(r"<pre>(.*?)</pre>", section, re.DOTALL)[1]).splitlines()  # type: ignore[index]
    assert score in finished.output
    for line in (again, score):
        done = type_in(tmp_path, line)
        assert done.returncode == 0, (line, done.stderr)
    assert len(run_folders(tmp_path)) == 2
    assert len(list(tmp_path.glob("**/evaluate/*/*/eval"))) == 1


def opened(uri: str | None) -> Image.Image:
    assert uri is not None
    head, _, data = uri.partition(",")
    assert head == "data:image/jpeg;base64"
    return Image.open(BytesIO(base64.b64decode(data)))


def test_a_thumbnail_has_the_pixels_but_no_metadata_and_no_rotation(tmp_path: Path):
    image = Image.new("RGB", (400, 100), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotated
    exif[0x010E] = "at home"
    image.save(tmp_path / "a.jpg", exif=exif, comment=b"secret", icc_profile=b"profile")
    thumbnail = Thumbnails(ImageFiles([tmp_path / "a.jpg"]), LIMITS)[0]
    small = opened(thumbnail.uri)
    assert small.size == (thumbnail.width, thumbnail.height) == (SIDE, SIDE // 4)
    assert not small.getexif()
    assert not {"comment", "icc_profile", "exif"} & small.info.keys()
    assert np.abs(np.array(small).astype(int) - [255, 0, 0]).max() < 8


def test_small_images_are_not_enlarged(tmp_path: Path):
    thumbnail = Thumbnails(ImageFiles([write_image(tmp_path / "a.png", 0, (28, 20))]), LIMITS)[0]
    assert opened(thumbnail.uri).size == (28, 20)
    assert thumbnail.small


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "I;16", "CMYK"])
def test_every_mode_becomes_a_thumbnail(tmp_path: Path, mode: str):
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    Image.new(mode, (30, 20)).save(path)
    assert opened(Thumbnails(ImageFiles([path]), LIMITS)[0].uri).mode == "RGB"


def test_a_missing_image_says_why(tmp_path: Path):
    path = tmp_path / "gone.png"
    (tmp_path / "broken.png").write_bytes(b"no image")
    gone, broken = (Thumbnails(ImageFiles([path, tmp_path / "broken.png"]), LIMITS)[number] for number in (0, 1))
    assert (gone.uri, gone.reason, gone.name) == (None, "no such file", "gone.png")
    assert broken.uri is None
    assert "not an image" in broken.reason
