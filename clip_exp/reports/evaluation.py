"""What scoring a task yields, what an evaluation leaves of it in its own folder and in the run's, and a table on the terminal.

`eval/<task>.json` has the metrics and the protocol, `eval/<task>.html` is for looking at, and a classification has a
row per class in `eval/<task>.csv` (`reports.classification_report`). In the run's folder the names of results of other weights than its own tell
which these are (`reports.names`).
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError
from safetensors.numpy import save_file

from clip_exp.config.evaluation import Scale
from clip_exp.errors import CheckpointError
from clip_exp.reports.html import fact_rows, heading, is_train_run, render
from clip_exp.reports.names import name_of_weights, scale_of
from clip_exp.reports.run_report import readable, renew_report, write_index
from clip_exp.runs import refuse_links, write_json, write_text
from clip_exp.storage import atomic_file, read_json_object

log = logging.getLogger(__name__)


class Details(Protocol):
    """What a page shows beyond the numbers, such as examples."""

    def report_files(self, result: "Result", heading: dict[str, Any]) -> dict[str, str]:
        """Return the texts of a task's files for people, by their suffix, such as `.html`.

        Args:
            heading: `html.heading`.
        """


@dataclass(frozen=True)
class TensorFile:
    """What `eval/<task>.<name>.safetensors` holds, for use elsewhere."""

    tensors: dict[str, np.ndarray]
    metadata: dict[str, str]


@dataclass(frozen=True)
class Result:
    """Numbers, how they were made, and what a page about them shows."""

    metrics: dict[str, float]  # shares are fractions
    protocol: dict[str, Any]  # JSON values
    details: Details | None = None  # on rank 0 only; None: the page has the numbers alone
    files: dict[str, TensorFile] = field(default_factory=dict)  # by name; on rank 0 only


def write_result(
    result: Result, task: str, folder: Path, run_dir: Path | None = None, name_in_run: str | None = None
) -> None:
    """Write a task's files below `folder`/eval and, if that can be written, `run_dir`/eval, which may be the same.

    A finished run's `report.html` comes to link the page. The run's results of an own checkpoint that it has trained on from keep a name of
    their own.

    Args:
        name_in_run: see `reports.names`; None: the task's.
    Raises:
        CheckpointError: `folder` cannot be written.
    """
    top = heading(task, result.protocol, folder)
    pages = (
        result.details.report_files(result, top) if result.details is not None else {".html": _plain_page(result, top)}
    )
    names = {folder: task} | ({} if run_dir is None else {run_dir: name_in_run or task})
    for target, name in names.items():
        try:
            if target != folder:
                refuse_links(target)  # which this command did not create
            if target == run_dir and name == task:
                _set_earlier_aside(result, task, target)
            _write(result, name, pages, target)
        except (OSError, SafetensorError, CheckpointError) as error:
            if target == folder:
                raise CheckpointError(f"{target / 'eval'} cannot be written: {error}") from error
            log.warning("%s cannot be written (%s): the results are in %s only.", target / "eval", error, folder)


def show(results: dict[str, dict[str, Any]], folder: Path) -> None:
    """Print the metrics of every task, and the page to open; of several tasks, one that leads to theirs."""
    table = Table("metric", "value", "images", "left out")
    table.columns[1].justify = table.columns[2].justify = table.columns[3].justify = "right"
    for task, result in results.items():
        protocol = result["protocol"]
        left_out = protocol.get("bad_images", 0) + protocol.get("unlabeled_images", 0)
        for name, value in result["metrics"].items():
            shown = f"{value:.0f}" if scale_of(name) is Scale.rank else f"{value:.4f}"
            table.add_row(f"{task}/{name}", shown, str(protocol.get("images", "")), str(left_out))
        if protocol.get("classes_without_images"):
            log.warning(
                "%s: %d of the %d classes have no images.",
                task,
                protocol["classes_without_images"],
                protocol["classes"],
            )
        if (warning := overlap_warning(task, protocol)) is not None:
            log.warning(warning)
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


def overlap_warning(task: str, protocol: dict[str, Any]) -> str | None:
    """Return what to say where images were scored that were learned from; None where there are none, or none are known."""
    overlap = protocol.get("overlap")
    if not overlap or not overlap["images"]:
        return None
    return (
        f"{task}: {overlap['images']:,} of the images that are scored are also among those to learn from ({overlap['same_file']:,} the same "
        f"files, {overlap['equal_content']:,} copies), such as {overlap['examples'][0]}: the result is better than it would be on new images."
    )


def _plain_page(result: Result, heading: dict[str, Any]) -> str:
    """Return the page of a result that has nothing but numbers."""
    tiles = [{"name": name, "value": readable(name, value), "meaning": ""} for name, value in result.metrics.items()]
    return render("result.html", **heading, tiles=tiles, protocol=fact_rows(result.protocol))


def _set_earlier_aside(result: Result, task: str, run_dir: Path) -> None:
    """Rename the run's own results of a task where they are of another checkpoint than those that replace them."""
    place = run_dir / "eval"
    try:
        earlier, now = Path(read_json_object(place / f"{task}.json")["protocol"]["weights"]), result.protocol["weights"]
    except (OSError, ValueError, KeyError, TypeError):  # there are none, or they do not say
        return
    name = name_of_weights(task, earlier)
    if name != name_of_weights(task, Path(now)):
        for suffix in (".json", ".csv", ".html", *(f".{of}.safetensors" for of in result.files)):
            path, aside = place / f"{task}{suffix}", place / f"{name}{suffix}"
            if path.is_file() and not aside.exists():
                path.replace(aside)


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
    if is_train_run(target) and (target / "report.html").is_file():
        try:
            renew_report(target)
        except (OSError, ValueError, KeyError, CheckpointError) as error:
            # What the run's files lack is no reason to lose an evaluation.
            log.warning("%s could not be renewed: %r", target / "report.html", error)
