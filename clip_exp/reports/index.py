"""What a folder's `eval/` holds, for pages that lead there."""

import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

from clip_exp.reports.metric_names import Scale, scale_of
from clip_exp.reports.origin import KINDS, heading, which_weights
from clip_exp.reports.page import counted, number, percent, render
from clip_exp.reports.result_names import task_of
from clip_exp.runs import write_text

METRICS_SHOWN = 4
FIRST = ("recall@1_i2t", "recall@1_t2i", "median_rank_i2t", "median_rank_t2i", "mean_of_shifted/top1")


def write_index(folder: Path) -> Path:
    """Write `folder`/report.html, which lists the evaluations in it; return it."""
    found = evaluations(folder)
    page = {**heading(folder.parent.name, found[0]["protocol"], folder), "kind": "Evaluation"}
    page["about"] = [*page["about"][:-1], counted(len(found), "task")]
    path = folder / "report.html"
    write_text(path, render("index.html", **page, evaluations=found))
    return path


def evaluations(folder: Path) -> list[dict[str, Any]]:
    """Return every result in `eval/`, by name: task, kind, weights, its first metrics as text, and the link to its page, None without one."""
    found = []
    for path in sorted((folder / "eval").glob("*.json"), key=lambda path: path.stem):  # a run's own weights come first
        result = json.loads(path.read_text(encoding="utf-8"))
        protocol = result["protocol"]
        metrics = sorted(result["metrics"].items(), key=lambda item: item[0] not in FIRST)
        page = path.with_suffix(".html")
        found.append(
            {
                "name": task_of(path.stem),
                "kind": KINDS.get(protocol.get("kind"), ""),
                "weights": which_weights(protocol),
                "metrics": [(name, readable(name, value)) for name, value in metrics[:METRICS_SHOWN]],
                "link": f"eval/{quote(page.name)}" if page.is_file() else None,
                "protocol": protocol,
            }
        )
    return found


def readable(name: str, value: float) -> str:
    """Return a metric's value as text: a fraction in percent, a rank as a number, a loss with four digits."""
    scale = scale_of(name)
    return f"{value:.4f}" if scale is Scale.loss else number(value) if scale is Scale.rank else percent(value)
