"""Results of a finished run: a table on the terminal and in `train.log`, `summary.json`, and the HTML report."""

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import pytorch_lightning as pl
from rich.console import Console
from rich.table import Table

from clip_exp.checkpoints.folders import best, latest
from clip_exp.config.training import TrainConfig
from clip_exp.data.bad_samples import VALIDATION, BadSamples
from clip_exp.data.datamodule import PairsDataModule
from clip_exp.data.tables.table import bad_rows, unconverted_values
from clip_exp.data.tables.unconverted import as_json
from clip_exp.errors import CheckpointError
from clip_exp.reports.run_report import data_facts, goodput_fact, next_command, next_step, update_report, write_report
from clip_exp.runs import RunRecord, write_json
from clip_exp.storage import read_json_object
from clip_exp.training.goodput import goodput
from clip_exp.training.metrics import MetricsCSV, data_wait_fraction
from clip_exp.training.module import CLIPModule

log = logging.getLogger(__name__)


def conclude(
    run_dir: Path, record: RunRecord, trainer: pl.Trainer, module: CLIPModule, config: TrainConfig, seconds: float
) -> None:
    """Write `summary.json`, mark the run as finished in `run.json`, write the report, and show the results.

    The report is written last: if it is missing after a kill or on a full disk, the same command writes the missing files.
    """
    summary = summarize(run_dir, record.values, trainer, module, config, seconds)
    with _warned():
        for earlier in ("summary.json", "report.html"):  # left by the run when it was shorter
            (run_dir / earlier).unlink(missing_ok=True)
        write_json(run_dir / "summary.json", summary)
    record.finish("finished", best_checkpoint=summary["best_checkpoint"])
    with _warned():
        write_report(run_dir)
    log.info(_table(run_dir, summary))


def add_scores(run_dir: Path, metrics: dict[str, float]) -> None:
    """Add metrics of tasks to `summary.json` and to the report of a finished run."""
    with _warned():
        summary = read_json_object(run_dir / "summary.json")
        summary["metrics"].update(metrics)
        write_json(run_dir / "summary.json", summary)
        update_report(run_dir)


@contextmanager
def _warned() -> Iterator[None]:
    """Warn, instead of failing, if a file cannot be written: training itself was successful."""
    try:
        yield
    except (OSError, ValueError, CheckpointError) as error:
        reason = str(error).rstrip(".")
        log.warning("%s. The run is finished: free disk space and repeat the command to write its report.", reason)


def summarize(
    run_dir: Path,
    record: dict[str, Any],
    trainer: pl.Trainer,
    module: CLIPModule,
    config: TrainConfig,
    seconds: float,
) -> dict[str, Any]:
    """Return the contents of `summary.json`; `metrics` are those of the last validation, the last scored tasks and the last logged loss."""
    rows = next(logger for logger in trainer.loggers if isinstance(logger, MetricsCSV)).in_order()
    last: dict[str, Any] = {}
    for row in rows:
        last.update(row)
    speeds = [row["train/samples_per_s"] for row in rows if "train/samples_per_s" in row]
    return {
        "name": config.name,
        "model": config.model.name,
        "data": config.data.name,
        "steps": trainer.global_step,
        "samples_seen": trainer.global_step * config.global_batch_size,
        "epochs": last.get("epoch"),
        "parameters": sum(p.numel() for p in module.model.parameters()),
        "ranks": trainer.world_size,
        "seconds": round(seconds, 2),
        "samples_per_s": round(median(speeds), 2) if speeds else None,
        "data_wait_fraction": data_wait_fraction(rows),
        "skipped_steps": last.get("train/skipped_steps", 0),
        "goodput": goodput(record, rows, datetime.now(UTC)),
        "val_images": trainer.datamodule.val_images,  # type: ignore[attr-defined]
        **summarize_data(trainer.datamodule, run_dir, trainer.global_step, trainer.world_size),  # type: ignore[attr-defined]
        "metrics": {name: value for name, value in last.items() if _is_result(name)},
        "last_checkpoint": str(latest(run_dir)),
        "best_checkpoint": str(best(run_dir)),
    }


def _is_result(column: str) -> bool:
    """Return True for the loss and for metrics of validation and of tasks, not for what describes the steps, such as `train/lr`."""
    return column == "train/loss" or ("/" in column and not column.startswith("train/"))


def summarize_data(datamodule: PairsDataModule, run_dir: Path, steps: int, ranks: int) -> dict[str, Any]:
    """Return the problems of the data, for `summary.json`.

    Args:
        datamodule: data module of this rank, after training.
        run_dir: the run folder.
        steps: optimizer steps of the run, including those before a restart.
        ranks: number of ranks.

    Returns:
        bad_images, bad_rows: counts by table (`training`, `validation`) and kind; tables without problems are left out.
        empty_captions: by table, the `count` and its `fraction` of all captions.
        filter_values: by table and column, the values that the filter could not compare (`tables.filters`).
        truncated_fraction: fraction of truncated captions among those that this rank has used since it started; None if it used none.
    """
    assert datamodule.stream is not None
    origins = {"training": [source.rows.origin for source in datamodule.stream.sources]}
    if datamodule.val is not None:
        origins["validation"] = [*datamodule.val.origins]
    captions = (steps * datamodule.global_batch_size - datamodule.start_sample) // ranks
    summary: dict[str, Any] = {"bad_images": {}, "bad_rows": {}, "empty_captions": {}, "filter_values": {}}
    file = run_dir / "bad_samples.csv"
    own = {"training": (datamodule.bad_samples, ""), "validation": (datamodule.bad_val_samples, VALIDATION)}
    for which, (samples, mark) in own.items():
        if file.is_file():  # contains those of all ranks; if it could not be written, only this rank's are known
            samples = BadSamples(0, 1.0, what="", mark=mark, file=file)
        if samples is not None and (kinds := samples.kinds()):
            summary["bad_images"][which] = dict(kinds.most_common())
    for which, found in origins.items():
        parts = [part for origin in found for part in origin.parts]
        if rows := bad_rows(parts):
            summary["bad_rows"][which] = dict(rows.most_common())
        if count := sum(origin.empty_captions for origin in found):
            summary["empty_captions"][which] = {"count": count, "fraction": count / sum(map(len, found))}
        if values := as_json(unconverted_values(parts)):
            summary["filter_values"][which] = values
    return {**summary, "truncated_fraction": min(1.0, datamodule.truncated / captions) if captions > 0 else None}


def _table(run_dir: Path, summary: dict[str, Any]) -> str:
    pairs = summary["samples_seen"] // max(1, summary["steps"])
    table = Table(title=f"{summary['name']}: {summary['steps']:,} steps of {pairs} pairs in {summary['seconds']:.0f} s")
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in summary["metrics"].items():
        table.add_row(name, f"{value:.4f}" if abs(value) < 1000 else f"{value:,.0f}")
    if summary["samples_per_s"] is not None:
        table.add_row("samples/s", f"{summary['samples_per_s']:,.0f}")
    buffer = io.StringIO()
    # In a notebook rich would display the table instead of writing it to the buffer.
    console = Console(file=buffer, soft_wrap=True, highlight=False, markup=False, force_jupyter=False)
    console.print(table)
    for name, text in data_facts(summary).items():
        console.print(f"{name}: {text}")
    if summary["goodput"]["restarts"]:
        console.print(f"goodput: {goodput_fact(summary)}")
    console.print(f"run folder:  {run_dir}")
    if (run_dir / "report.html").is_file():
        console.print(f"report:      {run_dir / 'report.html'}")
    if (run_dir / "eval").is_dir():
        console.print(f"tasks:       {run_dir / 'eval'}")
    console.print(f"next:        {next_step.get() or next_command(run_dir)}", markup=False)
    return buffer.getvalue().rstrip()
