"""Results of evaluation tasks: their files in the folders of the evaluation and of the run, and a table on the terminal.

`eval/<task>.json` has the metrics and the evaluation settings, `eval/<task>.html` is the report, and `eval/<task>.csv` has a row per
class of a classification (`reports.classification_report`). In a run's folder, results of weights other than the run's own have the
checkpoint in their names (`reports.names`).
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
from clip_exp.reports.run_report import readable, update_report, write_index
from clip_exp.runs import refuse_links, write_json, write_text
from clip_exp.storage import atomic_file, read_json_object

log = logging.getLogger(__name__)


class Details(Protocol):
    """Contents of a report beyond the metrics, such as examples."""

    def report_files(self, result: "Result", heading: dict[str, Any]) -> dict[str, str]:
        """Return the texts of the report files by suffix, such as `.html`.

        Args:
            result: result of the task.
            heading: values of `html.heading`.
        """


@dataclass(frozen=True)
class TensorFile:
    """Contents of `eval/<task>.<name>.safetensors`, for use in other programs."""

    tensors: dict[str, np.ndarray]
    metadata: dict[str, str]


@dataclass(frozen=True)
class Result:
    """Metrics of a task, its evaluation settings, and the contents of its report."""

    metrics: dict[str, float]  # accuracies and recalls are fractions, 0 to 1
    protocol: dict[str, Any]  # evaluation settings, as JSON values
    details: Details | None = None  # on rank 0 only; None: the report has the metrics alone
    files: dict[str, TensorFile] = field(default_factory=dict)  # by name; on rank 0 only


def write_result(
    result: Result, task: str, folder: Path, run_dir: Path | None = None, name_in_run: str | None = None
) -> None:
    """Write the files of a task in `folder`/eval and, if it is writable, in `run_dir`/eval; the two folders may be the same.

    The `report.html` of a finished run gets a link to the report of the task. Results of an earlier checkpoint of the run are renamed,
    not replaced.

    Args:
        result: result of the task.
        task: name of the task.
        folder: folder of the evaluation.
        run_dir: folder of the evaluated run; None: the model is not from a run.
        name_in_run: name of the files in the run's folder (`reports.names`); None: `task`.

    Raises:
        CheckpointError: `folder` cannot be written.
    """
    top = heading(task, result.protocol, folder)
    texts = (
        result.details.report_files(result, top)
        if result.details is not None
        else {".html": _plain_report(result, top)}
    )
    names = {folder: task} | ({} if run_dir is None else {run_dir: name_in_run or task})
    for target, name in names.items():
        try:
            if target != folder:
                refuse_links(target)  # which this command did not create
            if target == run_dir and name == task:
                _set_earlier_aside(result, task, target)
            _write(result, name, texts, target)
        except (OSError, SafetensorError, CheckpointError) as error:
            if target == folder:
                raise CheckpointError(f"{target / 'eval'} cannot be written: {error}") from error
            log.warning("%s cannot be written (%s): the results are only in %s.", target / "eval", error, folder)


def show(results: dict[str, dict[str, Any]], folder: Path) -> None:
    """Print the metrics of every task and the path of the report: of one task its own, of several tasks an index of theirs."""
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
            log.warning(
                "%s: texts truncated to the context length of the model: %d.", task, protocol["truncated_texts"]
            )
    console = Console(markup=False)
    console.print(table)
    console.print(f"Results: {folder}", soft_wrap=True, highlight=False)
    reports = [folder / "eval" / f"{task}.html" for task in results]
    reports = [report for report in reports if report.is_file()]
    if len(reports) > 1 and not is_train_run(folder):
        reports = [write_index(folder)]
    for report in reports:
        console.print(f"Open:    {report}", soft_wrap=True, highlight=False)


def overlap_warning(task: str, protocol: dict[str, Any]) -> str | None:
    """Return a warning that evaluated images are also training images; None if there are no such images, or if it is not known."""
    overlap = protocol.get("overlap")
    if not overlap or not overlap["images"]:
        return None
    return (
        f"{task}: evaluated images that are also training images: {overlap['images']:,} ({overlap['same_file']:,} the same files, "
        f"{overlap['equal_content']:,} copies), such as {overlap['examples'][0]}. The result is better than on unseen images."
    )


def _plain_report(result: Result, heading: dict[str, Any]) -> str:
    """Return the report of a result without details."""
    tiles = [{"name": name, "value": readable(name, value), "meaning": ""} for name, value in result.metrics.items()]
    return render("result.html", **heading, tiles=tiles, protocol=fact_rows(result.protocol))


def _set_earlier_aside(result: Result, task: str, run_dir: Path) -> None:
    """Rename the run's own results of a task if they are of another checkpoint than the new ones."""
    place = run_dir / "eval"
    try:
        earlier, now = Path(read_json_object(place / f"{task}.json")["protocol"]["weights"]), result.protocol["weights"]
    except (OSError, ValueError, KeyError, TypeError):  # no earlier results, or unknown weights
        return
    name = name_of_weights(task, earlier)
    if name != name_of_weights(task, Path(now)):
        for suffix in (".json", ".csv", ".html", *(f".{of}.safetensors" for of in result.files)):
            path, aside = place / f"{task}{suffix}", place / f"{name}{suffix}"
            if path.is_file() and not aside.exists():
                path.replace(aside)


def _write(result: Result, name: str, texts: dict[str, str], target: Path) -> None:
    place = target / "eval"
    place.mkdir(exist_ok=True)
    write_json(place / f"{name}.json", {"metrics": result.metrics, "protocol": result.protocol})
    for of, file in result.files.items():
        tensors = {
            key: np.ascontiguousarray(tensor) for key, tensor in file.tensors.items()
        }  # safetensors ignores strides
        with atomic_file(place / f"{name}.{of}.safetensors") as temporary:
            save_file(tensors, temporary, file.metadata)
    for suffix, text in texts.items():
        write_text(place / f"{name}{suffix}", text)
    if is_train_run(target) and (target / "report.html").is_file():
        try:
            update_report(target)
        except (OSError, ValueError, KeyError, CheckpointError) as error:
            # The evaluation is complete even if files of the run are missing or damaged.
            log.warning("%s could not be updated: %r", target / "report.html", error)
