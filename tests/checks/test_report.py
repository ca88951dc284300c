"""The report of a check in Chromium without a network, and for an almost empty data set."""

import re
from pathlib import Path

from clip_exp.checks.command import check_data
from clip_exp.config.compose import compose
from tests.checks.planted import plant
from tests.checks.test_planted import config_of, folder_of
from tests.reports.examples import ATTACK
from tests.reports.test_reports_in_browser import Browse, browse
from tests.small_runs import write_image

__all__ = ["browse"]


def test_the_report_opens_without_console_messages(browse: Browse, tmp_path: Path) -> None:
    config = config_of(plant(tmp_path), "num_workers=0", "data.max_bad_fraction=1")
    check_data(config, [])
    opened = browse(folder_of(config) / "report.html")
    assert opened.console == []
    assert not re.search(r"(?:src|href)=[\"']?https?:", opened.dom)
    assert opened.dom.count('<figure class="histogram">') == 2 * (4 + 1)
    for text in ("bad/truncated.jpg", "copy1.jpg", "val/leak2.jpg", "一只狗嘴里叼着球在海滩上奔跑", "18.9"):
        assert text in opened.dom


def test_an_attackers_caption_and_path_do_nothing(browse: Browse, tmp_path: Path) -> None:
    image = write_image(tmp_path / "it's <b>bold<b>.png", 0)
    quoted = ATTACK.replace('"', '""')
    (tmp_path / "pairs.csv").write_text(f'filepath,title\n"{image}","{quoted}"\n"{quoted}.png","{quoted}"\n')
    arguments = [f"data.train={tmp_path}/pairs.csv", f"output_dir={tmp_path}/outputs", "data.max_bad_fraction=1"]
    config = compose("check-data", arguments)
    check_data(config, [ATTACK])
    opened = browse(folder_of(config) / "report.html")
    assert opened.console == []
    assert "<title>owned" not in opened.dom
    assert "<title>csv" in opened.dom


def test_a_check_of_only_bad_images_has_a_report(tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text("filepath,title\na.jpg,a dog\n")
    arguments = [f"data.train={tmp_path}/pairs.csv", f"output_dir={tmp_path}/outputs", "data.max_bad_fraction=1"]
    config = compose("check-data", arguments)
    check_data(config, [])
    assert "No image can be used." in (folder_of(config) / "report.html").read_text(encoding="utf-8")
