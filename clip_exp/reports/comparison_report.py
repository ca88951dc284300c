"""HTML report of several models on the same datasets, with a figure as in the CLIP paper (Radford et al. 2021, figure 13)."""

from dataclasses import dataclass
from typing import Any

from clip_exp.reports.evaluation import Result
from clip_exp.reports.html import counted, fact_rows, listing, percent, render

MINUS = "\u2212"


@dataclass(frozen=True)
class Compared:
    """Top-1 accuracies of several models on the same datasets."""

    sets: list[str]
    top1: dict[str, list[float | None]]  # by model: a fraction per dataset; None: not scored

    def report_files(self, result: Result, heading: dict[str, Any]) -> dict[str, str]:
        return {".html": comparison_report(result, self, heading)}


def comparison_report(result: Result, details: Compared, heading: dict[str, Any]) -> str:
    """Return the HTML report of a comparison."""
    models, sets = list(details.top1), details.sets
    rows = [_row(each, [details.top1[model][at] for model in models]) for at, each in enumerate(sets)]
    averaged = result.protocol.get("mean_of", sets)
    if len(averaged) > 1:
        of_models = [[details.top1[model][sets.index(each)] for each in averaged] for model in models]
        known = [[accuracy for accuracy in accuracies if accuracy is not None] for accuracies in of_models]
        means = [sum(values) / len(values) if len(values) == len(averaged) else None for values in known]
        shifted = "shifted " if len(averaged) < len(sets) else ""
        rows.append(_row(f"mean of the {len(averaged)} {shifted}datasets", means, total=True))
    first = [(model, accuracy) for model in models if (accuracy := details.top1[model][0]) is not None]
    on_first = f" On {sets[0]}, top-1 accuracy is {listing([f'{percent(accuracy)} for {model}' for model, accuracy in first])}."
    return render(
        "comparison.html",
        **heading,
        models=models,
        rows=rows,
        gaps=len(models) == 2,
        tiles=[
            {
                "name": model,
                "value": "–" if accuracy is None else percent(accuracy),
                "meaning": f"top-1 accuracy, {rows[-1]['name']}",
            }
            for model, accuracy in zip(models, rows[-1]["accuracies"], strict=True)
        ],
        lead=f"{counted(len(models), 'model')} on {counted(len(sets), 'dataset')}, scored by the same code."
        + (on_first if first else ""),
        protocol=fact_rows(result.protocol),
    )


def _row(name: str, accuracies: list[float | None], total: bool = False) -> dict[str, Any]:
    known = [accuracy for accuracy in accuracies if accuracy is not None]
    gap = known[0] - known[1] if len(accuracies) == len(known) == 2 else None
    return {
        "name": name,
        "accuracies": accuracies,
        "total": total,
        "low": min(known, default=None),
        "high": max(known, default=None),
        "gap": "–" if gap is None else signed(gap),
    }


def signed(difference: float) -> str:
    """Return a difference of fractions in percentage points: 0.1234 is `+12.3`."""
    points = f"{abs(100 * difference):.1f}"
    return points if points == "0.0" else ("+" if difference > 0 else MINUS) + points
