"""The end of a run: what was found wrong with its data is in the summary, and a full disk leaves what it cannot write to the same command."""

import os
from pathlib import Path
from typing import Any

import pytest

from clip_exp.reports.run_report import data_facts
from clip_exp.runs import RunRecord
from clip_exp.storage import atomic_file
from clip_exp.training import summary
from clip_exp.training.summary import summarize_data
from tests.data.conftest import data_module, noise, write_table

# ------------------------------------------------------------------------------------------------------- on a full disk


SUMMARY = {
    "name": "a run", "steps": 2, "samples_seen": 32, "seconds": 1.0, "metrics": {"val/loss": 2.5}, "samples_per_s": 16.0,
    "best_checkpoint": "checkpoints/step-000002", "bad_images": {}, "bad_rows": {}, "truncated_fraction": None,
    "data_wait_fraction": None, "goodput": {"restarts": 0},
}  # fmt: skip


@pytest.mark.parametrize("unwritable", ["summary.json", "report.html"])
def test_a_report_that_cannot_be_written_costs_a_warning_and_is_missing(
    unwritable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def write(path: Path, text: str) -> None:
        if path.name == unwritable:
            raise OSError(28, os.strerror(28))
        with atomic_file(path) as temporary:
            temporary.write_text(text)

    def report(run_dir: Path) -> None:
        (run_dir / "summary.json").read_text()
        write(run_dir / "report.html", "page")

    monkeypatch.setattr(summary, "summarize", lambda *_: SUMMARY)
    monkeypatch.setattr(summary, "write_json", lambda path, values: write(path, str(values)))
    monkeypatch.setattr(summary, "write_report", report)
    for earlier in ("summary.json", "report.html"):
        (tmp_path / earlier).write_text("of a run that was shorter")
    nothing: Any = None
    summary.conclude(tmp_path, RunRecord(tmp_path), nothing, nothing, nothing, 1.0)
    assert not (tmp_path / "report.html").exists()
    assert RunRecord(tmp_path).values["status"] == "finished"
    assert "No space left on device" in caplog.text
    assert "repeat the command to write its report" in caplog.text


# ----------------------------------------------------------------------------------------- what was wrong with the data


def test_empty_captions_and_values_that_no_filter_compares_are_reported(tmp_path, caplog):
    noise(0).save(tmp_path / "0.png")
    rows = [
        ["filepath", "title", "width"],
        *(["0.png", "a caption", width] for width in ("300", "1,024", "", "512 px", "400")),
    ]
    rows += [["0.png", "", "300"], ["0.png", "\u00a0\u200b", "300"]]
    train = write_table(tmp_path / "train.csv", rows)
    val = write_table(tmp_path / "val.csv", [rows[0], *rows[-2:], ["0.png", "b", "300"], ["0.png", "c", "300"]])
    module = data_module(tmp_path / "outputs", str(train), val=str(val), filter="width >= 256", global_batch_size=1)
    module.setup()
    summary = summarize_data(module, tmp_path, steps=0, ranks=1)
    assert summary["empty_captions"] == {
        "training": {"count": 2, "fraction": 0.5},
        "validation": {"count": 2, "fraction": 0.5},
    }
    width = {"kind": "numbers", "count": 2, "missing": 1, "example": "1,024"}
    assert summary["filter_values"] == {"training": {"width": width}}
    facts = data_facts(summary)
    assert facts["empty captions"].replace("\u202f", " ") == "2 of training (50.0 %); 2 of validation (50.0 %)"
    assert (
        facts["filter"]
        == "width of training: 2 not numbers, such as '1,024', 1 missing; these values are null in the filter"
    )
    assert f"{train}: 2 of 4 captions are empty or blank." in caplog.text
    assert (
        f"{train}: data.filter reads these values as null: width (2 not numbers, such as '1,024' in line 3, 1 missing)."
        in caplog.text
    )


def test_faultless_data_has_nothing_to_tell(tmp_path):
    noise(0).save(tmp_path / "0.png")
    train = write_table(tmp_path / "train.csv", [["filepath", "title"], ["0.png", "a caption"]])
    module = data_module(tmp_path / "outputs", str(train), global_batch_size=1)
    module.setup()
    summary = summarize_data(module, tmp_path, steps=0, ranks=1)
    assert (summary["empty_captions"], summary["filter_values"]) == ({}, {})
    assert not {"empty captions", "filter"} & data_facts(summary).keys()


@pytest.mark.parametrize("key", ["data_wait_fraction", "data_wait_share"], ids=["current", "older version"])
def test_the_summary_of_an_older_version_has_the_same_facts(key: str) -> None:
    assert data_facts({key: 0.25})["waiting for data"].replace("\u202f", " ") == "25.0 % of the step time"
