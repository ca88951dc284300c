"""Goodput of a run: the fraction of the time since its first start that its steps needed, and what restarts cost.

Everything is computed from the run folder: `start` and `resumed` of `run.json`, and the rows of `metrics.csv`.
"""

from collections.abc import Iterator
from datetime import datetime
from itertools import pairwise
from typing import Any

ROUNDING_S = 1.0  # `run.json` has whole seconds


def goodput(record: dict[str, Any], rows: list[dict[str, Any]], now: datetime) -> dict[str, Any]:
    """Return the goodput of a run, for `summary.json`.

    Args:
        record: values of `run.json`.
        rows: rows of `metrics.csv`.
        now: time with a time zone.

    Returns:
        useful_s: time of the steps of the run, without those that were lost, and without validation, saving and starting.
        wall_s: time since the first start; None if the clock was set back, so that it is not known.
        fraction: `useful_s` over `wall_s`, between 0 and 1; None like `wall_s`.
        restarts: number of times that the run was started again.
        lost_steps: steps that were computed again after restarts. Only logged steps are known, so it may have been more.
    """
    resumed = record.get("resumed", [])
    useful_s = sum(_step_times(rows))
    wall_s = _wall_time([record.get("start"), *(entry.get("time") for entry in resumed)], now)
    if wall_s is not None:
        wall_s = max(wall_s, useful_s) if wall_s > useful_s - ROUNDING_S else None
    return {
        "useful_s": round(useful_s, 2),
        "wall_s": None if wall_s is None else round(wall_s, 2),
        "fraction": useful_s / wall_s if wall_s else None,
        "restarts": len(resumed),
        "lost_steps": sum(entry.get("lost_steps", 0) for entry in resumed),
    }


def note_restart(record: dict[str, Any], step: int, last_logged: int) -> None:
    """Add to the last restart in the values of `run.json` where the run resumes, and how many steps are lost.

    Args:
        record: values of `run.json`.
        step: step that the run resumes from.
        last_logged: last step in `metrics.csv`.
    """
    if record.get("resumed"):
        record["resumed"][-1].update(from_step=step, lost_steps=max(0, last_logged - step))


def _step_times(rows: list[dict[str, Any]]) -> Iterator[float]:
    """Yield the seconds of the steps of each logged row, those since the previous row."""
    timed = [row for row in rows if row.get("train/samples_per_s", 0.0) > 0 and "samples_seen" in row]
    for before, row in pairwise([{"samples_seen": 0}, *timed]):
        yield max(0, row["samples_seen"] - before["samples_seen"]) / row["train/samples_per_s"]


def _wall_time(starts: list[Any], now: datetime) -> float | None:
    """Return the seconds between the first of the starts, in order, and now; None if one is missing or the clock was set back."""
    try:
        times = [*map(datetime.fromisoformat, starts), now]
        steps_s = [(after - before).total_seconds() for before, after in pairwise(times)]
    except (TypeError, ValueError):  # missing, damaged, or without a time zone
        return None
    return sum(steps_s) if min(steps_s) > -ROUNDING_S else None
