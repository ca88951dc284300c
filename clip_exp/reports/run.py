"""A run's report: one HTML file that needs nothing else, with its numbers, its curves and how it was made."""

import base64
import html
import json
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from clip_exp.reports.plots import plot_run
from clip_exp.runs import write_text
from clip_exp.training.metrics import read_metrics

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2530; max-width: 1000px; margin: 2.5em auto; padding: 0 1.2em; }
h1 { font-size: 1.5em; margin-bottom: 0 } h2 { font-size: 1.1em; margin-top: 2em }
p.sub { color: #5c6773; margin-top: .2em } img { max-width: 100% }
table { border-collapse: collapse } td { padding: .2em 1.2em .2em 0; border-bottom: 1px solid #e4e8ec } td.n { text-align: right; font-variant-numeric: tabular-nums }
pre { background: #f5f7f9; padding: .8em 1em; overflow-x: auto; font-size: 13px } summary { cursor: pointer }
"""


def write_report(run_dir: Path) -> Path:
    """Draw `report.png` and write `report.html` from the run's own files; return the latter."""
    picture = run_dir / "report.png"
    plot_run(read_metrics(run_dir / "metrics.csv"), picture)
    summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    record = json.loads((run_dir / "run.json").read_text(encoding="utf-8"))
    page = _page(run_dir, summary, record, picture.read_bytes(), (run_dir / "config.yaml").read_text(encoding="utf-8"))
    path = run_dir / "report.html"
    write_text(path, page)
    return path


def next_command(run_dir: Path) -> str:
    """What to type to score the run: with the interpreter that this is, where a plain `python` is another."""
    interpreter = Path(sys.executable)
    found = shutil.which("python")
    if found is not None and Path(found) == interpreter:
        python = "python"
    else:
        python = (
            str(interpreter.relative_to(Path.cwd())) if interpreter.is_relative_to(Path.cwd()) else str(interpreter)
        )
    return shlex.join([python, "evaluate.py", f"run={run_dir}"])


def _page(run_dir: Path, summary: dict[str, Any], record: dict[str, Any], picture: bytes, config: str) -> str:
    title = html.escape(str(summary["name"]))
    encoded = base64.b64encode(picture).decode()
    facts = {
        "model": f"{summary['model']}, {summary['parameters']:,} parameters",
        "data": f"{summary['data']}, {record.get('rows', 0):,} rows",
        "length": f"{summary['steps']:,} steps, {summary['samples_seen']:,} pairs, {summary['epochs']:.1f} epochs",
        "time": f"{summary['seconds']:,.0f} s",
        "device": f"{record.get('ranks')} × {record.get('device_name')}, {record.get('strategy')}, {record.get('precision')}",
        "started": record.get("start"),
        "git": (record.get("git") or {}).get("commit"),
        "versions": ", ".join(f"{name} {number}" for name, number in record.get("packages", {}).items()),
    }
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style></head><body>
<h1>{title}</h1><p class="sub">{html.escape(str(run_dir))}</p>
<h2>Results</h2>{_table(summary["metrics"], numbers=True)}
<h2>Curves</h2><img alt="loss and metrics over the steps" src="data:image/png;base64,{encoded}">
<h2>How it was made</h2>{_table(facts)}
<h2>Next</h2><pre>python train.py {html.escape(shlex.join(record.get("argv", [])))}
{html.escape(next_command(run_dir))}</pre>
<details><summary>The complete configuration</summary><pre>{html.escape(config)}</pre></details>
</body></html>
"""


def _table(values: dict[str, Any], numbers: bool = False) -> str:
    def cell(value: Any) -> str:
        return f'<td class="n">{value:,.4f}</td>' if numbers else f"<td>{html.escape(str(value))}</td>"

    rows = "".join(
        f"<tr><td>{html.escape(name)}</td>{cell(value)}</tr>" for name, value in values.items() if value is not None
    )
    return f"<table>{rows}</table>"
