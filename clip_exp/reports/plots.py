"""Plots of training runs, drawn without a display."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from clip_exp.config.evaluation import Scale
from clip_exp.reports.names import scale_of

LABELS = {"train/data_wait_s": "waiting for data", "train/compute_s": "computing"}


def plot_run(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot the loss, validation and task metrics, learning rate, throughput and time per step over the steps of a run.

    Args:
        rows: rows of `metrics.csv`.
        path: path of the image file.
    """
    names = sorted({name for row in rows for name in row})
    of_tasks: dict[str, list[str]] = {}
    for name in names:
        task, _, metric = name.partition("/")
        # Only fractions share an axis: a median rank has another scale.
        if metric and task not in ("train", "val") and scale_of(metric) is Scale.fraction:
            of_tasks.setdefault(task, []).append(name)
    panels = {
        "loss": ["train/loss", "val/loss"],
        "recall on validation": [f"val/recall@{k}_{way}" for k in (1, 5, 10) for way in ("i2t", "t2i")],
        "zero-shot accuracy on validation": ["val/top1", "val/top5"],
        **of_tasks,
        "learning rate": ["train/lr"],
        "logit scale and gradient norm": ["train/logit_scale", "train/grad_norm"],
        "samples per second": ["train/samples_per_s"],
        "seconds per step": ["train/data_wait_s", "train/compute_s"],
    }
    present = {title: series for title, series in panels.items() if any(name in row for row in rows for name in series)}
    columns = 2
    height = max(1, -(-len(present) // columns))  # a run that lost its metrics.csv has no panel
    # Without pyplot, whose backend and figures belong to the program that calls clip_exp, such as a notebook.
    figure = Figure(figsize=(11, 3.1 * height), layout="constrained")
    axes = figure.subplots(height, columns, squeeze=False)
    for axis, (title, series) in zip(axes.flat, present.items(), strict=False):
        _draw(axis, title, series, rows)
    for axis in list(axes.flat)[len(present) :]:
        axis.set_visible(False)
    figure.savefig(path, dpi=110)


def _draw(axis: Axes, title: str, series: list[str], rows: list[dict[str, Any]]) -> None:
    for name in series:
        points = [(row["step"], row[name]) for row in rows if name in row]
        if points:
            steps, values = zip(*points, strict=True)
            axis.plot(
                steps,
                values,
                label=LABELS.get(name, name),
                marker="o" if len(points) < 30 else None,
                markersize=3,
                linewidth=1.3,
            )
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("step", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3)
    if len(series) > 1:
        axis.legend(fontsize=7)
    axis.spines[["top", "right"]].set_visible(False)
