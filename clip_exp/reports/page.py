"""Pages: the templates beside this file, filled in. Each is one HTML file that needs nothing else, from a disk or a server.

Whatever is filled in is escaped, and a policy in the page's head forbids the browser to load anything or to run any
script but ours: a caption or a file's name cannot do more than be read.
"""

import base64
import hashlib
from collections.abc import Sequence
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

NARROW_SPACE = "\u202f"  # between a number and its unit; no line breaks there
LONG = 80  # characters, or entries, that a table of facts shows unfolded

FACT_NAMES = {
    "kind": "task",
    "data": "data",
    "bad_pictures": "pictures that cannot be read",
    "unlabeled_pictures": "pictures without a label",
    "bad": "left out",
    "overlap": "scored images that are in train too",
    "classes_source": "class names from",
    "classes_sha256": "class names, sha256",
    "templates_source": "templates from",
    "templates_sha256": "templates, sha256",
    "names": "name of each label",
    "truncated_texts": "texts cut to the context length",
    "weights_sha256": "weights, sha256",
    "wise_ft": "mixed with what it started from",
    "step": "training step",
    "ema": "averaged weights (EMA)",
}
LAST = ("names", "bad")  # the long ones


def render(template: str, **values: Any) -> str:
    """Fill in `templates/<template>`; every value that it names must be given."""
    return _environment().get_template(template).render(**values)


def percent(share: float, digits: int = 1) -> str:
    """A fraction for reading: 0.915 is `91.5 %`."""
    return f"{100 * share:.{digits}f}{NARROW_SPACE}%"


def probability(share: float) -> str:
    """`percent`, but what is not quite 0 or 1 is not shown as these."""
    if 0 < share < 0.0005:
        return f"<{percent(0.001)}"
    return f">{percent(0.999)}" if 0.9995 <= share < 1 else percent(share)


def number(value: float) -> str:
    """With separators of thousands; four digits after the point where it is no whole number."""
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.4f}"


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """`1 picture`, `2 pictures`, `2 classes`."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def fact_rows(protocol: dict[str, Any]) -> list[dict[str, Any]]:
    """A protocol for reading: each a `name` and either a `text`, or `lines`, or `parts` that have facts of their own.

    A `summary` says that it is long, and is to be folded under these words.
    """
    ordered = [key for key in protocol if key not in LAST] + [key for key in LAST if key in protocol]
    return [_fact(key, protocol[key]) for key in ordered if protocol[key] is not None]


def _fact(key: str, value: Any) -> dict[str, Any]:
    fact = {"name": FACT_NAMES.get(key, key.replace("_", " ")), "text": "", "lines": [], "parts": [], "summary": ""}
    if isinstance(value, dict) and value and all(isinstance(item, dict) for item in value.values()):
        return {**fact, "parts": [{"name": name, "facts": fact_rows(item)} for name, item in value.items()]}
    if isinstance(value, dict):
        lines = [f"{label}: {_text(item)}" for label, item in value.items() if item is not None]
    elif isinstance(value, list):
        lines = [_text(item) for item in value]
    else:
        return {**fact, "text": _text(value)}
    return {**fact, "lines": lines, "summary": f"{len(lines):,} of them" if len(lines) > 8 or key in LAST else ""}


def _text(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float, list, dict)):
        return str(value)
    if isinstance(value, list):
        return ", ".join(_text(item) for item in value[:LONG]) + (" …" if len(value) > LONG else "")
    if isinstance(value, dict):
        return "; ".join(f"{label} {_text(item)}" for label, item in value.items())
    return f"{value:,}" if isinstance(value, int) else str(value)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("clip_exp.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style, script = _source(environment, "page.css"), _source(environment, "page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment.globals.update(style=Markup(style), script=Markup(script), script_sha256=digest, counted=counted)
    environment.filters.update(percent=percent, number=number, probability=probability)
    return environment


def _source(environment: Environment, name: str) -> str:
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]


def listing(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))
