"""What a folder's `eval/` holds, for pages that lead there."""

import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

from clip_exp.reports.origin import KINDS, heading
from clip_exp.reports.page import counted, number, percent, render
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
    """Every `eval/<task>.json`, by name: its kind, its first metrics as text, and the link to its page, None without one."""
    found = []
    for path in sorted((folder / "eval").glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        protocol = result["protocol"]
        metrics = sorted(result["metrics"].items(), key=lambda item: item[0] not in FIRST)
        page = path.with_suffix(".html")
        found.append(
            {
                "name": path.stem,
                "kind": KINDS.get(protocol.get("kind"), ""),
                "metrics": [(name, readable(name, value)) for name, value in metrics[:METRICS_SHOWN]],
                "link": f"eval/{quote(page.name)}" if page.is_file() else None,
                "protocol": protocol,
            }
        )
    return found


def readable(name: str, value: float) -> str:
    """A metric of an evaluation: a place as a number, a share in percent."""
    return number(value) if "rank" in name else percent(value)
