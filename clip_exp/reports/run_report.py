"""`report.html`: of a training run its metrics, curves, settings and evaluations; of an evaluation an index of its tasks."""

import base64
import json
from contextlib import suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml

from clip_exp.config.evaluation import Scale, TaskConfig
from clip_exp.config.targets import custom_packages
from clip_exp.reports.html import (
    command_line,
    command_of,
    counted,
    fact_rows,
    heading,
    number,
    percent,
    probability,
    render,
    title_of,
    which_weights,
)
from clip_exp.reports.names import few_images, scale_of, task_of
from clip_exp.runs import read_metrics, read_record, write_text

METRICS_SHOWN = 4
# What a call of the Python API shows as the next step, instead of a command
next_step: ContextVar[str | None] = ContextVar("next_step", default=None)


def write_report(run_dir: Path) -> Path:
    """Draw `report.png` and write `report.html` from the files of a run; return the path of `report.html`."""
    # matplotlib takes a second to import; `update_report` does not need it.
    from clip_exp.reports.plots import plot_run

    plot_run(read_metrics(run_dir / "metrics.csv"), run_dir / "report.png")
    return update_report(run_dir)


def update_report(run_dir: Path) -> Path:
    """Write `report.html` with the existing curves and the current evaluations; return its path."""
    summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    record, epochs = read_record(run_dir), summary["epochs"]
    facts = {
        "model": f"{summary['model']}, {summary['parameters']:,} parameters",
        "data": f"{summary['data']}, {counted(record.get('rows', 0), 'row')}",
        "length": f"{counted(summary['steps'], 'step')}, {counted(summary['samples_seen'], 'pair')}"
        + (f", {epochs:.1f} epochs" if epochs is not None else ""),
        **data_facts(summary),
        "time": f"{summary['seconds']:,.0f} s",
        "goodput": goodput_fact(summary),
        "device": f"{record.get('ranks')} × {record.get('device_name')}, {record.get('strategy')}, {record.get('precision')}",
        "started": record.get("start"),
        "git": (record.get("git") or {}).get("commit"),
        "versions": ", ".join(f"{name} {version}" for name, version in record.get("packages", {}).items()),
    }
    path = run_dir / "report.html"
    write_text(
        path,
        render(
            "run.html",
            title=str(summary["name"]),
            kind="Training run",
            about=[
                str(summary["model"]),
                str(summary["data"]),
                counted(summary["steps"], "step"),
                f"{number(round(summary['seconds']))} s",
            ],
            made_by=str(run_dir),
            metrics=[
                (name, f"{value:,.0f}" if scale_of(name) is Scale.rank else f"{value:,.4f}")
                for name, value in summary["metrics"].items()
                if value is not None
            ],
            curves=base64.b64encode((run_dir / "report.png").read_bytes()).decode(),
            evaluations=evaluations(run_dir),
            facts=fact_rows(facts),
            command=command_of(run_dir),
            next_command=next_command(run_dir),
            config=(run_dir / "config.yaml").read_text(encoding="utf-8"),
        ),
    )
    return path


def next_command(run_dir: Path) -> str:
    """Return the command that evaluates the run, with the key that allows its custom code."""
    custom: list[str] = []
    with suppress(OSError):
        custom = custom_packages(yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8")))
    return command_line("evaluate", [f"run={run_dir}", *([f"allow_targets=[{','.join(custom)}]"] if custom else [])])


def data_facts(summary: dict[str, Any]) -> dict[str, str]:
    """Return facts about the data and the steps of a run as texts by name, without those that are zero or missing in the summary."""

    def bad(key: str, consequence: str) -> str:
        """Return a text such as `4 of training (3 no such file, 1 empty file), left out`."""
        texts = [
            f"{sum(kinds.values()):,} of {table} ({', '.join(f'{count:,} {kind}' for kind, count in kinds.items())})"
            for table, kinds in (summary.get(key) or {}).items()
        ]
        return f"{'; '.join(texts)}, {consequence}" if texts else ""

    def fraction(key: str, of_what: str) -> str:
        value = summary.get(key, summary.get(key.replace("fraction", "share")))  # name in older runs
        if not value:
            return ""
        return f"{percent(value)} {of_what}" if value >= 0.001 else f"less than {percent(0.001)} {of_what}"

    empty = [  # such as `28 of training (66.7 %)`
        f"{found['count']:,} of {table} ({probability(found['fraction'])})"
        for table, found in (summary.get("empty_captions") or {}).items()
    ]
    filters = []  # such as `width of training: 3 not numbers, such as '1,024', 2 missing`
    for table, columns in (summary.get("filter_values") or {}).items():
        for column, found in columns.items():
            parts = [f"{found['missing']:,} missing"] if found["missing"] else []
            if found["count"]:
                parts.insert(0, f"{found['count']:,} not {found['kind']}, such as {found['example']!r}")
            filters.append(f"{column} of {table}: {', '.join(parts)}")
    skipped = summary.get("skipped_steps")
    facts = {
        "bad images": bad("bad_images", "listed in bad_samples.csv"),
        "bad rows": bad("bad_rows", "left out"),
        "empty captions": "; ".join(empty),
        "filter": f"{'; '.join(filters)}; these values are null in the filter" if filters else "",
        "validation": few_images(summary.get("val_images")),
        "skipped steps": f"{skipped:,}, because their gradient was not finite" if skipped else "",
        "truncated captions": fraction("truncated_fraction", "of the training captions"),
        "waiting for data": fraction("data_wait_fraction", "of the step time"),
    }
    return {name: text for name, text in facts.items() if text}


def goodput_fact(summary: dict[str, Any]) -> str | None:
    """Return the goodput of a run and what its restarts cost, as text; None in the summary of an older version."""
    found = summary.get("goodput")
    if found is None:
        return None
    texts = ["unknown, because the clock was set back"]
    if found["fraction"] is not None:
        texts = [f"steps took {percent(found['fraction'])} of the {found['wall_s']:,.0f} s since the first start"]
    if found["restarts"]:
        texts += [
            counted(found["restarts"], "restart"),
            f"at least {counted(found['lost_steps'], 'step')} computed again",
        ]
    return ", ".join(texts)


def write_index(folder: Path) -> Path:
    """Write `folder`/report.html, an index of the tasks of an evaluation; return its path."""
    found = evaluations(folder)
    values = {**heading(folder.parent.name, found[0]["protocol"], folder), "kind": "Evaluation"}
    values["about"] = [*values["about"][:-1], counted(len(found), "task")]
    path = folder / "report.html"
    write_text(path, render("index.html", **values, evaluations=found))
    return path


def evaluations(folder: Path) -> list[dict[str, Any]]:
    """Return the results in `eval/`, sorted by name, with their first metrics as text and the link to the report or None."""
    found = []
    for path in sorted(
        (folder / "eval").glob("*.json"), key=lambda path: path.stem
    ):  # results of the run's own weights come first
        result = json.loads(path.read_text(encoding="utf-8"))
        protocol = result["protocol"]
        task = TaskConfig.kinds().get(protocol.get("kind"))
        first = task.headline if task is not None else ()
        metrics = sorted(result["metrics"].items(), key=lambda item: item[0] not in first)
        report = path.with_suffix(".html")
        found.append(
            {
                "name": task_of(path.stem),
                "kind": title_of(protocol.get("kind")),
                "weights": which_weights(protocol),
                "metrics": [(name, readable(name, value)) for name, value in metrics[:METRICS_SHOWN]],
                "link": f"eval/{quote(report.name)}" if report.is_file() else None,
                "protocol": protocol,
            }
        )
    return found


def readable(name: str, value: float) -> str:
    """Return the value of a metric as text: a fraction in percent, a rank as a number, a loss with four decimals."""
    scale = scale_of(name)
    return f"{value:.4f}" if scale is Scale.loss else number(value) if scale is Scale.rank else percent(value)
