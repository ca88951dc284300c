"""The page of several models on the same sets: a figure as in the CLIP paper (Radford et al. 2021, figure 13), and a table."""

from typing import Any

from clip_exp.reports.page import counted, fact_rows, listing, percent, render
from clip_exp.reports.results import Compared, Result

MINUS = "\u2212"


def comparison_page(result: Result, details: Compared, heading: dict[str, Any]) -> str:
    """The HTML of a comparison's page.

    Args:
        heading: `page.heading`.
    """
    models = list(details.top1)
    averaged = result.protocol.get("mean_of", details.sets)
    rows = [_row(each, [details.top1[model][at] for model in models]) for at, each in enumerate(details.sets)]
    if len(averaged) > 1:
        shifted = "shifted " if len(averaged) < len(details.sets) else ""
        means = [_mean(details, model, averaged) for model in models]
        rows.append(_row(f"mean of the {len(averaged)} {shifted}sets", means, total=True))
    return render(
        "comparison.html",
        **heading,
        models=models,
        rows=rows,
        gaps=len(models) == 2,
        tiles=_tiles(models, rows[-1]) if rows else [],
        lead=_lead(models, details),
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


def _mean(details: Compared, model: str, sets: list[str]) -> float | None:
    shares = [details.top1[model][details.sets.index(each)] for each in sets]
    known = [share for share in shares if share is not None]
    return sum(known) / len(known) if len(known) == len(shares) else None


def _tiles(models: list[str], row: dict[str, Any]) -> list[dict[str, str]]:
    return [
        {"name": model, "value": "–" if share is None else percent(share), "meaning": f"top-1, {row['name']}"}
        for model, share in zip(models, row["shares"], strict=True)
    ]


def _lead(models: list[str], details: Compared) -> str:
    first = [
        f"{percent(details.top1[model][0])} for {model}"  # type: ignore[arg-type]
        for model in models
        if details.top1[model][0] is not None
    ]
    on_first = f" On {details.sets[0]}, top-1 is {listing(first)}." if first else ""
    return f"{counted(len(models), 'model')} on {counted(len(details.sets), 'set')}, scored by the same code.{on_first}"
