"""A run's report: one HTML file that needs nothing else, with its numbers, its curves and how it was made."""

import base64
import json
from pathlib import Path
from typing import Any

from clip_exp.reports.data_facts import data_facts
from clip_exp.reports.index import evaluations
from clip_exp.reports.metric_names import Scale, scale_of
from clip_exp.reports.origin import command_line, command_of
from clip_exp.reports.page import counted, fact_rows, number, render
from clip_exp.runs import read_metrics, read_record, write_text


def write_report(run_dir: Path) -> Path:
    """Draw `report.png` and write `report.html` from the run's own files; return the latter."""
    # matplotlib takes a second to import, and an evaluation that renews the report does not need it.
    from clip_exp.reports.plots import plot_run

    plot_run(read_metrics(run_dir / "metrics.csv"), run_dir / "report.png")
    return renew_report(run_dir)


def renew_report(run_dir: Path) -> Path:
    """Write `report.html` with the curves that are there, and the evaluations of now."""
    summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    path = run_dir / "report.html"
    write_text(
        path,
        render(
            "run.html",
            title=str(summary["name"]),
            kind="Training run",
            about=_about(summary),
            made_by=str(run_dir),
            metrics=[(name, _metric(name, value)) for name, value in summary["metrics"].items() if value is not None],
            curves=base64.b64encode((run_dir / "report.png").read_bytes()).decode(),
            evaluations=evaluations(run_dir),
            facts=fact_rows(_facts(summary, read_record(run_dir))),
            command=command_of(run_dir),
            next_command=next_command(run_dir),
            config=(run_dir / "config.yaml").read_text(encoding="utf-8"),
        ),
    )
    return path


def next_command(run_dir: Path) -> str:
    """Return what to type to score the run."""
    return command_line("evaluate", [f"run={run_dir}"])


def _about(summary: dict[str, Any]) -> list[str]:
    return [
        str(summary["model"]),
        str(summary["data"]),
        counted(summary["steps"], "step"),
        f"{number(round(summary['seconds']))} s",
    ]


def _metric(name: str, value: float) -> str:
    return f"{value:,.0f}" if scale_of(name) is Scale.rank else f"{value:,.4f}"


def _facts(summary: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    epochs = summary["epochs"]
    return {
        "model": f"{summary['model']}, {summary['parameters']:,} parameters",
        "data": f"{summary['data']}, {counted(record.get('rows', 0), 'row')}",
        "length": f"{counted(summary['steps'], 'step')}, {counted(summary['samples_seen'], 'pair')}"
        + (f", {epochs:.1f} epochs" if epochs is not None else ""),
        **data_facts(summary),
        "time": f"{summary['seconds']:,.0f} s",
        "device": f"{record.get('ranks')} × {record.get('device_name')}, {record.get('strategy')}, {record.get('precision')}",
        "started": record.get("start"),
        "git": (record.get("git") or {}).get("commit"),
        "versions": ", ".join(f"{name} {version}" for name, version in record.get("packages", {}).items()),
    }
