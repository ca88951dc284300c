"""What pages are made of: the templates beside this file, filled in; where a page comes from; numbers, facts and thumbnails on it.

Each page is one HTML file that needs nothing else, from a disk or a server. Whatever is filled in is escaped, and a policy in the
page's head forbids the browser to load anything or to run any script but ours: a caption or a file's name cannot do more than be read.
"""

import base64
import hashlib
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from clip_exp.config import registry
from clip_exp.config.evaluation import TaskConfig
from clip_exp.data.files import BadImage
from clip_exp.data.image_sets import ImageSet
from clip_exp.runs import read_record

NARROW_SPACE = "\u202f"  # between a number and its unit; no line breaks there
LONG = 80  # characters, or entries, that a table of facts shows unfolded
CHECKOUT = Path(__file__).resolve().parents[2]  # if this is one: it has the scripts beside the package
SIDE = 200  # pixels of a thumbnail's longest side
QUALITY = 82  # of its JPEG
SMALL = 64  # pixels; an image with shorter sides is shown enlarged, and its pixels as squares
NO_LIMIT = 2**62  # of pixels: an image that was scored has passed the evaluation's own limit
FACT_NAMES = {
    "kind": "task",
    "data": "data",
    "bad_images": "images that cannot be read",
    "unlabeled_images": "images without a label",
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


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("clip_exp.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    assert environment.loader is not None
    style, script = (environment.loader.get_source(environment, name)[0] for name in ("report.css", "report.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment.globals.update(style=Markup(style), script=Markup(script), script_sha256=digest, counted=counted)
    environment.filters.update(percent=percent, number=number, probability=probability)
    return environment


def heading(name: str, protocol: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What the template of every evaluation's page begins and ends with."""
    weights = protocol.get("weights_sha256")
    about = [
        protocol.get("model"),
        weights and f"weights {weights[:12]}",
        which_weights(protocol),
        protocol.get("data"),
    ]
    record = read_record(folder)
    made_by = [f"clip_exp {record['clip_exp']}" if "clip_exp" in record else None, record.get("start"), str(folder)]
    return {
        "title": name,
        "kind": title_of(protocol.get("kind")),
        "about": [str(part) for part in about if part],
        "made_by": " · ".join(filter(None, made_by)),
        "command": command_of(folder),
    }


def title_of(kind: Any) -> str:
    """Return what a kind of task is called on pages."""
    task = TaskConfig.kinds().get(kind)
    return (task.title if task is not None else "") or str(kind or "").replace("_", " ")


def which_weights(protocol: dict[str, Any]) -> str | None:
    """Return which of a run's weights were scored; None of others."""
    step = protocol.get("step")
    averaged = "averaged weights (EMA)" if protocol.get("ema") else None
    return ", ".join(filter(None, [f"step {step:,}" if isinstance(step, int) else None, averaged])) or None


def is_train_run(folder: Path) -> bool:
    """Whether a run was trained in this folder; else it is an evaluation's."""
    return (folder / "metrics.csv").is_file()


def command_of(folder: Path) -> str | None:
    """Return what to type to make again what the folder holds; None where it does not say."""
    arguments = read_record(folder).get("argv")
    if arguments is None:
        return None
    if not is_train_run(folder):
        return command_line("evaluate", arguments)
    # The same command would find that the run has finished.
    return command_line("train", [*(word for word in arguments if not word.startswith("resume=")), "resume=never"])


def command_line(command: str, arguments: list[str]) -> str:
    """Return what to type here to run a command: the script of this checkout, the installed program, or the module."""
    here, interpreter, script = Path.cwd(), Path(sys.executable), CHECKOUT / f"{command}.py"
    program, python = shutil.which("clip-exp"), shutil.which("python")
    if python is None or Path(python) != interpreter:  # not what `python` runs
        python = str(interpreter.relative_to(here) if interpreter.is_relative_to(here) else interpreter)
    else:
        python = "python"
    if script.is_file() and here == CHECKOUT:
        words = [python, script.name]
    elif program is not None and Path(program).parent == interpreter.parent:
        words = ["clip-exp", command]
    elif script.is_file():
        words = [python, str(script)]
    else:
        words = [python, "-m", "clip_exp", command]
    own = [word for folder in registry.folders() for word in ("--config-dir", str(folder))]
    return shlex.join([*words, *own, *arguments])


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
    """`1 image`, `2 images`, `2 classes`."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def listing(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def fact_rows(protocol: dict[str, Any]) -> list[dict[str, Any]]:
    """A protocol for reading: each a `name` and either a `text`, or `lines`, or `parts` that have facts of their own.

    A `summary` says that it is long, and is to be folded under these words.
    """
    rows = []
    for key in [key for key in protocol if key not in LAST] + [key for key in LAST if key in protocol]:
        if (value := protocol[key]) is None:
            continue
        fact: dict[str, Any] = {
            "name": FACT_NAMES.get(key, key.replace("_", " ")),
            "text": "",
            "lines": [],
            "parts": [],
            "summary": "",
        }
        if isinstance(value, dict) and value and all(isinstance(item, dict) for item in value.values()):
            fact["parts"] = [{"name": name, "facts": fact_rows(item)} for name, item in value.items()]
        elif isinstance(value, dict):
            fact["lines"] = [f"{label}: {_text(item)}" for label, item in value.items() if item is not None]
        elif isinstance(value, list):
            fact["lines"] = [_text(item) for item in value]
        else:
            fact["text"] = _text(value)
        if isinstance(value, dict | list) and not fact["parts"] and (len(fact["lines"]) > 8 or key in LAST):
            fact["summary"] = f"{len(fact['lines']):,} of them"
        rows.append(fact)
    return rows


def _text(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float, list, dict)):
        return str(value)
    if isinstance(value, list):
        return ", ".join(_text(item) for item in value[:LONG]) + (" …" if len(value) > LONG else "")
    if isinstance(value, dict):
        return "; ".join(f"{label} {_text(item)}" for label, item in value.items())
    return f"{value:,}" if isinstance(value, int) else str(value)


@dataclass(frozen=True)
class Thumbnail:
    """An image for a page. Where it cannot be read any more, `uri` is None and `reason` says why."""

    uri: str | None  # data:image/jpeg;base64,…
    width: int
    height: int
    path: str
    reason: str = ""

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.replace("\\", "/").rstrip("/").rpartition("/")[2]

    @property
    def small(self) -> bool:
        return max(self.width, self.height) < SMALL


class Thumbnails:
    """Thumbnails of a set, each made once: what the model saw (EXIF ignored, RGB), before its crop; nothing of the file but pixels."""

    def __init__(self, images: ImageSet) -> None:
        self._images = images
        self._made: dict[int, Thumbnail] = {}

    def __getitem__(self, index: int) -> Thumbnail:
        if index not in self._made:
            path = self._images.name(index)
            try:
                self._made[index] = shrunk(self._images.open(index, NO_LIMIT).convert("RGB"), path)
            except BadImage as error:
                self._made[index] = Thumbnail(None, SIDE, SIDE, path, str(error))
        return self._made[index]


def shrunk(image: Image.Image, path: str) -> Thumbnail:
    """A thumbnail of an RGB image, which is made small in place."""
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    bare = Image.new("RGB", image.size)
    bare.paste(image)
    buffer = BytesIO()
    bare.save(buffer, "JPEG", quality=QUALITY, optimize=True)
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return Thumbnail(f"data:image/jpeg;base64,{encoded}", *image.size, path)
