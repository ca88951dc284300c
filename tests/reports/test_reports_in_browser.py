"""Reports in Chromium without a network: scripts run, nothing is requested, the console stays empty."""

import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from clip_exp.reports.evaluation import Result, show, write_result
from tests.reports.examples import (
    ATTACK,
    classification_result,
    classified,
    compared_result,
    noise_files,
    retrieval_result,
    retrieved,
)

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions",
    "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--v=0", "--window-size=1200,2400", "--dump-dom",
)  # fmt: skip
TIMEOUT_S = 120
CONSOLE = re.compile(r"CONSOLE(?::|\()\d+.*")


class Opened(NamedTuple):
    dom: str  # after the scripts
    console: list[str]


Browse = Callable[[Path], Opened]


@pytest.fixture(scope="session")
def browse() -> Browse:
    """Return a function that opens a page in Chromium; its processes end with the call."""
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip(f"no Chromium: none of {', '.join(NAMES)} is on PATH")

    def run(page: Path) -> Opened:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
            process = subprocess.Popen(
                [program, *FLAGS, f"--user-data-dir={profile}", page.as_uri()],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
            )  # fmt: skip
            try:
                dom, log = process.communicate(timeout=TIMEOUT_S)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.communicate()
        assert "</html>" in dom, log
        return Opened(dom, CONSOLE.findall(log))

    return run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "vit nano" / "now"
    path.mkdir(parents=True)
    return path


def report_of(result: Result, folder: Path) -> Path:
    write_result(result, "task", folder)
    return folder / "eval" / "task.html"


def test_the_console_is_watched(browse: Browse, tmp_path: Path):
    (tmp_path / "broken.html").write_text("<script>nothing.here()</script><img src=http://localhost:9/a.png>")
    assert "nothing is not defined" in browse(tmp_path / "broken.html").console[0]


def test_a_report_of_few_classes_opens(browse: Browse, folder: Path):
    opened = browse(report_of(classification_result(classified(noise_files(folder, 8), 12, 300)), folder))
    assert opened.console == []
    assert 'aria-sort="none"><button type="button">top-1</button>' in opened.dom
    assert "12 rows; click a column name to sort" in opened.dom
    assert "<canvas" not in opened.dom


def test_a_report_of_1000_classes_opens_and_draws_its_map(browse: Browse, folder: Path):
    opened = browse(report_of(classification_result(classified(noise_files(folder, 8), 1000, 5000)), folder))
    assert opened.console == []
    assert "1,000 rows; click a column name to sort" in opened.dom
    assert re.search(r'<canvas [^>]*aria-label="Confusion map of 1000 classes', opened.dom)
    assert "Hover over a dot to see its numbers; click to zoom in." in opened.dom


def test_an_attackers_names_and_captions_do_nothing(browse: Browse, folder: Path):
    details = classified(noise_files(folder, 8), 60, 300)
    details.class_names[0] = ATTACK
    details.class_names[1] = "</script><script>document.title = 'owned'</script>"
    captions = [ATTACK, *(f"caption {number}" for number in range(9))]
    for result in (classification_result(details), retrieval_result(retrieved(noise_files(folder, 10), captions))):
        opened = browse(report_of(result, folder))
        assert opened.console == []
        assert "<title>owned" not in opened.dom
        assert "<title>task" in opened.dom


def test_retrieval_comparison_and_their_index_open(browse: Browse, folder: Path):
    tasks = {
        "pairs": retrieval_result(retrieved(noise_files(folder, 10), [f"猫 {number}" for number in range(10)])),
        "robustness": compared_result(),
    }
    for name, result in tasks.items():
        write_result(result, name, folder)
    show({name: {"metrics": result.metrics, "protocol": result.protocol} for name, result in tasks.items()}, folder)
    for page in (folder / "eval" / "pairs.html", folder / "eval" / "robustness.html", folder / "report.html"):
        opened = browse(page)
        assert opened.console == []
        assert not re.search(r"(?:src|href)=[\"']?https?:", opened.dom)
