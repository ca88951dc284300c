"""What a run tells about its data, in words."""

from typing import Any

from clip_exp.reports.page import percent


def data_facts(summary: dict[str, Any]) -> dict[str, str]:
    """Name to text; what was faultless, or was not counted yet when the summary was written, is left out.

    Args:
        summary: of a run, as `summary.json` has it.
    """
    facts = {
        "bad pictures": _counted(summary.get("bad_pictures") or {}, "listed in bad_samples.csv"),
        "bad rows": _counted(summary.get("bad_rows") or {}, "left out"),
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


def _share(value: float | None, of_what: str) -> str:
    if not value:
        return ""
    return f"{percent(value)} {of_what}" if value >= 0.001 else f"less than {percent(0.001)} {of_what}"
