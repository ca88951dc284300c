"""What a run tells about its data, in words."""

from typing import Any

from clip_exp.reports.page import percent, probability


def data_facts(summary: dict[str, Any]) -> dict[str, str]:
    """Name to text; what was faultless, or was not counted yet when the summary was written, is left out.

    Args:
        summary: of a run, as `summary.json` has it.
    """
    facts = {
        "bad pictures": _counted(summary.get("bad_pictures") or {}, "listed in bad_samples.csv"),
        "bad rows": _counted(summary.get("bad_rows") or {}, "left out"),
        "empty captions": _empty(summary.get("empty_captions") or {}),
        "filter": _filter_values(summary.get("filter_values") or {}),
        "cut captions": _share(summary.get("truncated_share"), "of those trained on"),
        "waiting for data": _share(summary.get("data_wait_share"), "of the time of steps"),
    }
    return {name: text for name, text in facts.items() if text}


def _counted(tables: dict[str, dict[str, int]], what_became: str) -> str:
    """`4 of training (3 no such file, 1 empty file), left out`."""
    texts = [
        f"{sum(kinds.values()):,} of {table} ({', '.join(f'{count:,} {kind}' for kind, count in kinds.items())})"
        for table, kinds in tables.items()
    ]
    return f"{'; '.join(texts)}, {what_became}" if texts else ""


def _empty(tables: dict[str, dict[str, Any]]) -> str:
    """`28 of training (66.7 %)`."""
    return "; ".join(
        f"{found['count']:,} of {table} ({probability(found['fraction'])})" for table, found in tables.items()
    )


def _filter_values(tables: dict[str, dict[str, dict[str, Any]]]) -> str:
    """`width of training: 3 not numbers, such as '1,024', 2 missing; these match nothing`."""
    texts = []
    for table, columns in tables.items():
        for column, found in columns.items():
            counted = [f"{found['missing']:,} missing"] if found["missing"] else []
            if found["count"]:
                counted.insert(0, f"{found['count']:,} not {found['kind']}, such as {found['example']!r}")
            texts.append(f"{column} of {table}: {', '.join(counted)}")
    return f"{'; '.join(texts)}; these match nothing" if texts else ""


def _share(value: float | None, of_what: str) -> str:
    if not value:
        return ""
    return f"{percent(value)} {of_what}" if value >= 0.001 else f"less than {percent(0.001)} {of_what}"
