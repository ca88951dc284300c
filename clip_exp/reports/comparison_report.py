"""The page of several models on the same sets: a figure as in the CLIP paper (Radford et al. 2021, figure 13), and a table."""

from dataclasses import dataclass
from typing import Any

from clip_exp.reports.evaluation import Result
from clip_exp.reports.html import counted, fact_rows, listing, percent, render

MINUS = "\u2212"


@dataclass(frozen=True)
class Compared:
    """The same sets scored with several models."""

    sets: list[str]
    top1: dict[str, list[float | None]]  # model: a fraction per set; None where it has none

    def report_files(self, result: Result, heading: dict[str, Any]) -> dict[str, str]:
        return {".html": comparison_report(result, self, heading)}


def comparison_report(result: Result, details: Compared, heading: dict[str, Any]) -> str:
    """The HTML of a comparison's page."""
    models, sets = list(details.top1), details.sets
    rows = [_row(each, [details.top1[model][at] for model in models]) for at, each in enumerate(sets)]
    averaged = result.protocol.get("mean_of", sets)
    if len(averaged) > 1:
        of_models = [[details.top1[model][sets.index(each)] for each in averaged] for model in models]
        known = [[share for share in shares if share is not None] for shares in of_models]
        means = [sum(shares) / len(shares) if len(shares) == len(averaged) else None for shares in known]
        shifted = "shifted " if len(averaged) < len(sets) else ""
        rows.append(_row(f"mean of the {len(averaged)} {shifted}sets", means, total=True))
    first = [(model, share) for model in models if (share := details.top1[model][0]) is not None]
    on_first = f" On {sets[0]}, top-1 is {listing([f'{percent(share)} for {model}' for model, share in first])}."
    return render(
        "comparison.html",
        **heading,
        models=models,
        rows=rows,
        gaps=len(models) == 2,
        tiles=[
            {"name": model, "value": "–" if share is None else percent(share), "meaning": f"top-1, {rows[-1]['name']}"}
            for model, share in zip(models, rows[-1]["shares"], strict=True)
        ],
        lead=f"{counted(len(models), 'model')} on {counted(len(sets), 'set')}, scored by the same code."
        + (on_first if first else ""),
        protocol=fact_rows(result.protocol),
    )


def _row(name: str, shares: list[float | None], total: bool = False) -> dict[str, Any]:
    known = [share for share in shares if share is not None]
    gap = shares[0] - shares[1] if len(shares) == 2 and shares[0] is not None and shares[1] is not None else None
    return {
        "name": name,
        "shares": shares,
        "total": total,
        "low": min(known, default=None),
        "high": max(known, default=None),
        "gap": "–" if gap is None else signed(gap),
    }


def signed(difference: float) -> str:
    """A difference of fractions in points: 0.1234 is `+12.3`."""
    points = f"{abs(100 * difference):.1f}"
    return points if points == "0.0" else ("+" if difference > 0 else MINUS) + points
