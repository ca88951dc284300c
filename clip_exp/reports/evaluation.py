"""What an evaluation leaves: of each task `eval/<task>.json`, in its own folder and in the run's; and a table on the terminal."""

import logging
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from clip_exp.evaluation.results import Result
from clip_exp.runs import write_json

log = logging.getLogger(__name__)


def write_result(result: Result, name: str, folder: Path, run_dir: Path | None = None) -> None:
    """Write a task's files below `folder`/eval and, if that can be written, `run_dir`/eval.

    Raises:
        OSError: `folder` cannot be written.
    """
    for target in filter(None, (folder, run_dir)):
        try:
            (target / "eval").mkdir(exist_ok=True)
            write_json(target / "eval" / f"{name}.json", {"metrics": result.metrics, "protocol": result.protocol})
        except OSError as error:
            if target is folder:
                raise
            log.warning(
                "%s cannot be written (%s): the results are in %s only.", target / "eval", error.strerror, folder
            )


def show(results: dict[str, dict[str, Any]], folder: Path) -> None:
    """Print the metrics of every task, and where its files are."""
    table = Table("metric", "value", "pictures", "left out")
    table.columns[1].justify = table.columns[2].justify = table.columns[3].justify = "right"
    for task, result in results.items():
        protocol = result["protocol"]
        left_out = protocol["bad_pictures"] + protocol.get("unlabeled_pictures", 0)
        for name, value in result["metrics"].items():
            shown = f"{value:.0f}" if "rank" in name else f"{value:.4f}"
            table.add_row(f"{task}/{name}", shown, str(protocol["pictures"]), str(left_out))
        if protocol.get("classes_without_pictures"):
            log.warning(
                "%s: %d of the %d classes have no pictures.",
                task,
                protocol["classes_without_pictures"],
                protocol["classes"],
            )
    console = Console()
    console.print(table)
    console.print(f"Results: {folder}", soft_wrap=True, highlight=False)
