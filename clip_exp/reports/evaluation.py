"""What an evaluation leaves of each task, in its own folder and in the run's, and a table on the terminal.

`eval/<task>.json` has the metrics and the protocol, `eval/<task>.html` is for looking at, and a classification has a
row per class in `eval/<task>.csv` (`reports.per_class`).
"""

import logging
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError
from safetensors.numpy import save_file

from clip_exp.errors import CheckpointError
from clip_exp.reports.classification_page import classification_page
from clip_exp.reports.comparison_page import comparison_page
from clip_exp.reports.index import write_index
from clip_exp.reports.origin import heading, is_train_run
from clip_exp.reports.per_class import as_csv
from clip_exp.reports.results import Classified, Compared, Result, Retrieved
from clip_exp.reports.retrieval_page import retrieval_page
from clip_exp.reports.run_page import renew_report
from clip_exp.runs import refuse_links, write_json, write_text
from clip_exp.storage import atomic_file

log = logging.getLogger(__name__)


def write_result(result: Result, name: str, folder: Path, run_dir: Path | None = None) -> None:
    """Write a task's files below `folder`/eval and, if that can be written, `run_dir`/eval.

    A finished run's `report.html` comes to link the page.

    Raises:
        CheckpointError: `folder` cannot be written.
    """
    pages = _pages(result, name, folder)
    for target in filter(None, (folder, run_dir)):
        try:
            if target is run_dir:
                refuse_links(run_dir)  # which this command did not create
            _write(result, name, pages, target)
            _renew_report(target)
        except (OSError, SafetensorError, CheckpointError) as error:
            if target is folder:
                raise CheckpointError(f"{target / 'eval'} cannot be written: {error}") from error
            log.warning("%s cannot be written (%s): the results are in %s only.", target / "eval", error, folder)


def show(results: dict[str, dict[str, Any]], folder: Path) -> None:
    """Print the metrics of every task, and the page to open; of several tasks, one that leads to theirs."""
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
        if protocol.get("truncated_texts"):
            log.warning("%s: texts longer than the model's context were cut: %d.", task, protocol["truncated_texts"])
    console = Console()
    console.print(table)
    console.print(f"Results: {folder}", soft_wrap=True, highlight=False)
    pages = [folder / "eval" / f"{task}.html" for task in results]
    pages = [page for page in pages if page.is_file()]
    if len(pages) > 1 and not is_train_run(folder):
        pages = [write_index(folder)]
    for page in pages:
        console.print(f"Open:    {page}", soft_wrap=True, highlight=False)


def _pages(result: Result, name: str, folder: Path) -> dict[str, str]:
    """The texts of a task's files for people, by their suffix."""
    details, top = result.details, heading(name, result.protocol, folder)
    if isinstance(details, Classified):
        return {".csv": as_csv(details), ".html": classification_page(name, result, details, top)}
    if isinstance(details, Retrieved):
        return {".html": retrieval_page(name, result, details, top)}
    if isinstance(details, Compared):
        return {".html": comparison_page(name, result, details, top)}
    return {}


def _write(result: Result, name: str, pages: dict[str, str], target: Path) -> None:
    place = target / "eval"
    place.mkdir(exist_ok=True)
    write_json(place / f"{name}.json", {"metrics": result.metrics, "protocol": result.protocol})
    for of, file in result.files.items():
        tensors = {key: np.ascontiguousarray(tensor) for key, tensor in file.tensors.items()}  # or rows and columns mix
        with atomic_file(place / f"{name}.{of}.safetensors") as temporary:
            save_file(tensors, temporary, file.metadata)
    for suffix, text in pages.items():
        write_text(place / f"{name}{suffix}", text)


def _renew_report(folder: Path) -> None:
    """Let a finished run's report link the new page. What the run's files lack is no reason to lose an evaluation."""
    if not is_train_run(folder) or not (folder / "report.html").is_file():
        return
    try:
        renew_report(folder)
    except (OSError, ValueError, KeyError, CheckpointError) as error:
        log.warning("%s could not be renewed: %r", folder / "report.html", error)
