"""Goodput: the time of the steps that count over the time since the first start, also after restarts and changes of the clock."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from clip_exp.reports.run_report import goodput_fact
from clip_exp.training.goodput import goodput, note_restart
from tests.runs import Finished, Train
from tests.training.test_resume import RUN, interrupted

START = datetime(2026, 3, 1, 12, tzinfo=UTC)
# 100 steps of 8 pairs, of which each takes 0.5 s, except for the first one, which takes 2 s
ROWS = [
    {"step": 1, "samples_seen": 8, "train/samples_per_s": 4.0},
    {"step": 50, "samples_seen": 400, "train/samples_per_s": 16.0},
    {"step": 50, "val/loss": 2.0},
    {"step": 100, "samples_seen": 800, "train/samples_per_s": 16.0},
]
USEFUL_S = 2.0 + 99 * 0.5


def record(*restarts_s: float, **lost: Any) -> dict[str, Any]:
    times = [(START + timedelta(seconds=each)).isoformat(timespec="seconds") for each in restarts_s]
    return {"start": START.isoformat(timespec="seconds"), "resumed": [{"time": time, **lost} for time in times]}


def at(seconds: float, values: dict[str, Any], rows: list[dict[str, Any]] = ROWS) -> dict[str, Any]:
    return goodput(values, rows, START + timedelta(seconds=seconds))


def test_goodput_is_the_time_of_the_steps_over_the_time_since_the_first_start() -> None:
    assert at(103, {"start": START.isoformat()}) == {
        "useful_s": USEFUL_S, "wall_s": 103.0, "fraction": USEFUL_S / 103, "restarts": 0, "lost_steps": 0,
    }  # fmt: skip


def test_steps_that_were_lost_are_counted_as_such_and_not_as_useful() -> None:
    values = record(60.0, 90.0)
    for entry, (step, last) in zip(values["resumed"], [(50, 70), (50, 50)], strict=True):
        note_restart({"resumed": [entry]}, step, last)
    found = at(206, values)
    assert [(entry["from_step"], entry["lost_steps"]) for entry in values["resumed"]] == [(50, 20), (50, 0)]
    assert (found["restarts"], found["lost_steps"]) == (2, 20)
    assert found["fraction"] == USEFUL_S / 206


def test_the_first_start_is_no_restart() -> None:
    values: dict[str, Any] = {"start": START.isoformat()}
    note_restart(values, 0, 0)
    assert "resumed" not in values


@pytest.mark.parametrize(
    ("values", "now_s"),
    [
        pytest.param({"start": START.isoformat()}, -3600, id="set back below the start"),
        pytest.param({"start": START.isoformat()}, 10, id="less time than the steps took"),
        pytest.param(record(4000.0, 300.0), 5000, id="set back between restarts"),
        pytest.param(record(4000.0), 300, id="set back after a restart"),
        pytest.param({}, 100, id="no start recorded"),
        pytest.param({"start": "2026-03-01"}, 100, id="a start without a time zone"),
        pytest.param({"start": "yesterday"}, 100, id="a start that is not a time"),
    ],
)
def test_goodput_is_unknown_if_the_clock_was_set_back(values: dict[str, Any], now_s: float) -> None:
    found = at(now_s, values)
    assert (found["wall_s"], found["fraction"]) == (None, None)
    assert "unknown" in str(goodput_fact({"goodput": found}))


@pytest.mark.parametrize("wall_s", [USEFUL_S - 0.9, USEFUL_S, 1e9])
def test_the_fraction_is_between_0_and_1_although_times_are_in_whole_seconds(wall_s: float) -> None:
    assert 0 < at(wall_s, {"start": START.isoformat()})["fraction"] <= 1


def test_a_run_without_rows_has_no_useful_time() -> None:
    assert at(100, {"start": START.isoformat()}, [])["fraction"] == 0
    assert at(0, {"start": START.isoformat()}, [])["fraction"] is None


def test_the_report_says_what_restarts_cost() -> None:
    found = at(206, record(60.0, lost_steps=1))
    text = str(goodput_fact({"goodput": found})).replace("\u202f", " ")
    assert text == "steps took 25.0 % of the 206 s since the first start, 1 restart, at least 1 step computed again"
    assert goodput_fact({}) is None, "the summary of an older version"


def test_a_resumed_run_reports_its_goodput(single: Finished, train: Train, tmp_path: Path) -> None:
    folder = interrupted(single, tmp_path)
    run = train(*RUN, output_dir=tmp_path, draw=True)
    assert run.folder == folder
    (restart,) = run.record["resumed"]
    assert (restart["from_step"], restart["lost_steps"]) == (10, 10)
    found = json.loads((folder / "summary.json").read_text())["goodput"]
    assert (found["restarts"], found["lost_steps"]) == (1, 10)
    assert 0 < found["fraction"] < 1
    text = "1 restart, at least 10 steps computed again"
    assert text in run.output
    assert text in (folder / "report.html").read_text()
    assert "restart" not in single.output
