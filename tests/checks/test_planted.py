"""Each planted fault is found and counted exactly."""

import csv
import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from clip_exp.checks.command import check_data
from clip_exp.config.commands import CheckDataConfig
from clip_exp.config.compose import compose
from clip_exp.errors import DataError
from tests.checks.planted import GOOD, Planted, plant


class Checked(NamedTuple):
    report: dict[str, Any]
    folder: Path


def config_of(planted: Planted, *overrides: str) -> CheckDataConfig:
    tables = (f"data.train={planted.train}", f"data.val={planted.val}")
    output = f"output_dir={planted.train.parents[1] / 'outputs'}"
    return compose("check-data", [*tables, output, *overrides])


def folder_of(config: CheckDataConfig) -> Path:
    return max((Path(config.output_dir) / "check_data" / config.name).iterdir())


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return plant(tmp_path_factory.mktemp("planted"))


@pytest.fixture(scope="module")
def checked(planted: Planted) -> Checked:
    config = config_of(planted, "num_workers=0", "data.max_bad_fraction=0.5")
    assert check_data(config, ["name=here"]) == 0
    folder = folder_of(config)
    return Checked(json.loads((folder / "report.json").read_text()), folder)


@pytest.fixture(scope="module")
def train(checked: Checked) -> dict[str, Any]:
    return checked.report["splits"]["train"]


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_rows_and_images_are_counted(train: dict[str, Any]) -> None:
    assert train["rows"] == 56
    assert train["images"] == train["images_checked"] == GOOD + 7 + 8 + 2


def test_bad_rows_are_counted_by_reason_and_listed(train: dict[str, Any], checked: Checked) -> None:
    assert train["bad_rows"]["by_reason"] == {"wrong number of fields": 3, "NUL character": 1}
    assert train["bad_rows"]["fraction"] == pytest.approx(4 / 60)
    assert [row["line"] for row in rows_of(checked.folder / "bad_rows.csv")] == ["58", "59", "60", "61"]


def test_bad_images_are_counted_by_kind_and_listed(train: dict[str, Any], checked: Checked) -> None:
    """The images that training or, for the strip, validation would not use."""
    kinds = {"no such file": 2, "empty file": 1, "not an image": 1, "outside the data root": 1, "too many pixels": 1}
    assert train["bad_images"]["by_kind"] == {**kinds, "truncated": 1}
    assert checked.report["splits"]["val"]["bad_images"]["by_kind"] == {"side too long": 1}
    listed = {row["path"]: row["reason"].partition(":")[0] for row in rows_of(checked.folder / "bad_samples.csv")}
    assert listed == {
        "bad/missing1.jpg": "no such file",
        "bad/missing2.jpg": "no such file",
        "bad/truncated.jpg": "truncated",
        "bad/page.jpg": "not an image",
        "bad/empty.jpg": "empty file",
        "bad/huge.png": "too many pixels",
        "../outside.jpg": "outside the data root",
        "val/strip.png": "side too long",
    }


def test_sizes_formats_and_oddities_are_those_of_the_files(train: dict[str, Any]) -> None:
    assert train["smaller_than_input"]["count"] == 3
    assert train["sizes"]["width"]["min"] == 16
    assert train["sizes"]["height"]["max"] == 400  # of 400 x 250 on its side
    assert train["formats"] == {"JPEG": GOOD + 2 + 2, "PNG": 4, "GIF": 1, "WEBP": 1}
    assert train["modes"]["L"] == 1
    assert train["exif_rotated"]["count"] == 2
    assert train["animated"]["count"] == 1
    for histogram in train["histograms"].values():
        assert sum(histogram["counts"]) == GOOD + 2 + 8
        assert len(histogram["edges"]) == len(histogram["counts"]) + 1


def test_captions_that_are_cut_empty_or_repeated_are_counted(train: dict[str, Any]) -> None:
    captions = train["captions"]
    assert captions["truncated"]["count"] == 2
    assert captions["truncated"]["examples"][0]["tokens"] == captions["tokens"]["max"] > 77
    assert captions["empty"]["count"] == 2
    assert captions["most_frequent"][0] == {"caption": "a photo", "rows": 8}
    assert sum(captions["histogram"]["counts"]) == captions["count"] == 56


def test_scripts_that_the_tokenizer_takes_apart_are_named(train: dict[str, Any]) -> None:
    scripts = train["captions"]["scripts"]
    assert {name: found["captions"] for name, found in scripts.items() if found["split_badly"]} == {
        "Han": 3,
        "Arabic": 2,
        "Devanagari": 2,
    }
    assert scripts["Han"]["times_english"] > 10
    assert not scripts["Latin"]["split_badly"]
    assert scripts["no letters"]["captions"] == 2


def test_copies_and_repeated_pairs_are_found(train: dict[str, Any], checked: Checked) -> None:
    copies, pairs = train["duplicates"]["images"], train["duplicates"]["pairs"]
    assert (copies["groups"], copies["copies"]) == (1, 2)
    assert copies["examples"] == [["good/00.jpg", "copy0.jpg", "copy1.jpg"]]
    assert (pairs["groups"], pairs["copies"]) == (1, 2)
    listed = rows_of(checked.folder / "duplicates.csv")
    assert [row["path"] for row in listed if row["what"] == "image"] == copies["examples"][0]


def test_leakage_is_found_by_bytes_path_and_pair(checked: Checked) -> None:
    leakage = checked.report["leakage"]
    assert (leakage["images"], leakage["fraction"]) == (3, pytest.approx(3 / 12))
    assert leakage["same_bytes"]["count"] == 3
    assert leakage["same_path"]["examples"] == [{"val": "good/04.jpg", "train": "good/04.jpg"}]
    assert leakage["same_image_and_caption"]["examples"] == [
        {"path": "val/leak2.jpg", "caption": "a red bicycle, number 2"}
    ]
    assert len(rows_of(checked.folder / "leakage.csv")) == 4


def test_each_problem_has_a_verdict_with_a_fix(checked: Checked) -> None:
    assert {(verdict["split"], verdict["subject"]) for verdict in checked.report["verdicts"]} == {
        *(("train", subject) for subject in ("bad_rows", "bad_images", "duplicate_images", "duplicate_pairs")),
        *(("train", subject) for subject in ("truncated_captions", "empty_captions", "equal_captions")),
        *(("train", subject) for subject in ("badly_split_scripts", "small_images", "exif_rotated", "animated")),
        *(("val", subject) for subject in ("leakage", "bad_images")),
    }
    fixes = {(verdict["split"], verdict["subject"]): verdict["fix"] for verdict in checked.report["verdicts"]}
    assert all(fixes.values())
    assert "Training replaces them with other images" in fixes["train", "bad_images"]
    assert "Validation leaves them out" in fixes["val", "bad_images"]
    assert checked.report["exit_code"] == 0


def test_two_workers_find_what_none_finds(planted: Planted, checked: Checked) -> None:
    config = config_of(planted, "num_workers=2", "data.max_bad_fraction=0.5")
    check_data(config, [])
    report = json.loads((folder_of(config) / "report.json").read_text())
    assert {**report, "speed": None} == {**checked.report, "speed": None}


def test_a_sample_is_the_same_each_time_and_says_that_it_is_one(planted: Planted) -> None:
    reports = []
    for _ in range(2):
        config = config_of(planted, "num_workers=0", "max_images=12", "data.max_bad_fraction=1")
        check_data(config, [])
        reports.append(json.loads((folder_of(config) / "report.json").read_text()))
    assert reports[0]["splits"] == reports[1]["splits"]
    assert reports[0]["splits"]["train"]["images_checked"] == 12
    assert reports[0]["splits"]["train"]["captions"]["count"] == 56
    assert reports[0]["leakage"]["sampled"]


def test_without_decoding_headers_still_tell(planted: Planted) -> None:
    config = config_of(planted, "num_workers=0", "decode=false", "data.max_bad_fraction=1")
    check_data(config, [])
    report = json.loads((folder_of(config) / "report.json").read_text())
    assert report["splits"]["train"]["bad_images"]["by_kind"]["too many pixels"] == 1
    assert report["splits"]["train"]["exif_rotated"]["count"] == 2
    assert report["speed"]["samples_per_s"] is None


@pytest.mark.parametrize(
    ("override", "subject"),
    [
        ("data.max_bad_fraction=0.1", "bad_images"),
        ("data.max_empty_caption_fraction=0.01", "empty_captions"),
        ("max_leakage=0.1", "leakage"),
    ],
)
def test_above_a_threshold_the_findings_are_written_and_the_data_refused(
    planted: Planted, override: str, subject: str
) -> None:
    config = config_of(planted, "num_workers=0", "decode=false", "data.max_bad_fraction=0.5", override)
    with pytest.raises(DataError, match="image"):
        check_data(config, [])
    report = json.loads((folder_of(config) / "report.json").read_text())
    assert report["exit_code"] == 3
    assert [verdict["subject"] for verdict in report["verdicts"] if verdict["level"] == "error"] == [subject]
    assert (folder_of(config) / "report.html").is_file()
