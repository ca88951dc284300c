"""The end of a run on a full disk: training has ended well, and what could not be written is left to the same command."""

import os
from pathlib import Path
from typing import Any

import pytest

from clip_exp.runs import RunRecord
from clip_exp.storage import atomic_file
from clip_exp.training import summary

SUMMARY = {
    "name": "a run", "steps": 2, "samples_seen": 32, "seconds": 1.0, "metrics": {"val/loss": 2.5}, "samples_per_s": 16.0,
    "best_checkpoint": "checkpoints/step-000002", "bad_pictures": {}, "bad_rows": {}, "truncated_share": None,
    "data_wait_share": None,
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
    assert "the same command writes its report" in caplog.text
