"""Parts of HTML reports: rendering of the templates, headings, commands, formatted numbers, tables of facts, and thumbnails.

Each report is a single HTML file that loads nothing else. All values are escaped, and a content security policy in the head forbids
the browser to load anything or to run other scripts: captions and file names are displayed as text only.
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
from clip_exp.config.help import WITH_VALUE
from clip_exp.data.files import BadImage, ImageLimits
from clip_exp.data.image_sets import ImageSet
from clip_exp.runs import read_record

NARROW_SPACE = "\u202f"  # between a number and its unit; non-breaking
LONG = 80  # entries of a list that a table of facts shows
CHECKOUT = Path(__file__).resolve().parents[2]  # repository with train.py and evaluate.py, if the package is in one
SIDE = 200  # longest side of a thumbnail, pixels
QUALITY = 82  # JPEG quality of thumbnails
SMALL = 64  # pixels; smaller images are enlarged without interpolation
FACT_NAMES = {
    "kind": "task",
    "data": "data",
    "bad_images": "unreadable images",
    "unlabeled_images": "images without a label",
    "bad": "unreadable images, with reasons",
    "overlap": "overlap with the training images",
    "classes_source": "source of class names",
    "classes_sha256": "class names, sha256",
    "templates_source": "source of templates",
    "templates_sha256": "templates, sha256",
    "names": "name of each label",
    "truncated_texts": "truncated texts",
    "weights_sha256": "weights, sha256",
    "wise_ft": "interpolation with the initial weights (WiSE-FT)",
    "step": "training step",
    "ema": "averaged weights (EMA)",
}

LAST = ("names", "bad")  # long facts, which are shown last


def render(template: str, **values: Any) -> str:
    """Render `templates/<template>`; a missing value is an error."""
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
    """Return the values that the templates of all evaluation reports need: title, kind, model and data, command, versions."""
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
    """Return the title of a kind of task in reports."""
    task = TaskConfig.kinds().get(kind)
    return (task.title if task is not None else "") or str(kind or "").replace("_", " ")


def which_weights(protocol: dict[str, Any]) -> str | None:
    """Return the step and kind of the evaluated weights of a run; None if they are not from a run."""
    step = protocol.get("step")
    averaged = "averaged weights (EMA)" if protocol.get("ema") else None
    return ", ".join(filter(None, [f"step {step:,}" if isinstance(step, int) else None, averaged])) or None


def is_train_run(folder: Path) -> bool:
    """Return True if the folder is that of a training run, not of an evaluation."""
    return (folder / "metrics.csv").is_file()


def command_of(folder: Path) -> str | None:
    """Return the command that reproduces the results in a folder; None if it is not recorded."""
    arguments = read_record(folder).get("argv")
    if arguments is None:
        return None
    if not is_train_run(folder):
        return command_line("evaluate", arguments)
    # Without resume=never the command would find the finished run.
    return command_line("train", [*(word for word in arguments if not word.startswith("resume=")), "resume=never"])


def command_line(command: str, arguments: list[str]) -> str:
    """Return a command line for the current folder, with the script of the repository, the installed program, or the module."""
    here, interpreter, script = Path.cwd(), Path(sys.executable), CHECKOUT / f"{command}.py"
    program, python = shutil.which("clip-exp"), shutil.which("python")
    if python is None or Path(python) != interpreter:  # `python` is another interpreter
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
    if not any(word.startswith(("--config-dir", "-cd", "hydra.searchpath=")) for word in arguments):
        words += _config_dir()
    return shlex.join([*words, *arguments])


def split_arguments(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Return the flags of a command with their values, and its overrides."""
    flags = {i for i, word in enumerate(arguments) if word.startswith("-")}
    flags |= {i + 1 for i in flags if arguments[i] in WITH_VALUE}
    words = list(enumerate(arguments))
    return [word for i, word in words if i in flags], [word for i, word in words if i not in flags]


def _config_dir() -> list[str]:
    """Return the arguments that name the user's folders with options and Python files."""
    match [str(folder) for folder in registry.folders()]:
        case []:
            return []
        case [folder]:
            return ["--config-dir", folder]
        case several:
            return [f"hydra.searchpath=[{','.join(several)}]"]


def percent(fraction: float, digits: int = 1) -> str:
    """Return a fraction in percent: 0.915 is `91.5 %`."""
    return f"{100 * fraction:.{digits}f}{NARROW_SPACE}%"


def probability(fraction: float) -> str:
    """Return a fraction in percent, with `<` or `>` for values close to 0 or 1, which would be rounded to them."""
    if 0 < fraction < 0.0005:
        return f"<{percent(0.001)}"
    return f">{percent(0.999)}" if 0.9995 <= fraction < 1 else percent(fraction)


def number(value: float) -> str:
    """Return a number with thousands separators, and with four decimals unless it is an integer."""
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.4f}"


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """Return a count with its noun: `1 image`, `2 images`, `2 classes`."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def listing(names: Sequence[str]) -> str:
    """Return names as an enumeration: `a`, `a and b`, `a, b and c`."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def fact_rows(protocol: dict[str, Any]) -> list[dict[str, Any]]:
    """Return evaluation settings as table rows: a `name` with a `text`, `lines`, or `parts` that have rows themselves.

    A non-empty `summary` is the title of a collapsed section with the lines.
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
            fact["summary"] = f"{len(fact['lines']):,} entries"
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
    """Small copy of an image for a report. `uri` is None if the image cannot be read anymore, and `reason` says why."""

    uri: str | None  # data:image/jpeg;base64,…
    width: int
    height: int
    path: str
    reason: str = ""

    @property
    def name(self) -> str:
        """Name of the image file."""
        return self.path.replace("\\", "/").rstrip("/").rpartition("/")[2]

    @property
    def small(self) -> bool:
        return max(self.width, self.height) < SMALL


class Thumbnails:
    """Cached thumbnails of a dataset: RGB pixels before the crop of the model, without EXIF orientation or other metadata.

    Args:
        images: images of the dataset.
        limits: limits of the evaluation.
    """

    def __init__(self, images: ImageSet, limits: ImageLimits) -> None:
        self._images, self._limits = images, limits
        self._made: dict[int, Thumbnail] = {}

    def __getitem__(self, index: int) -> Thumbnail:
        if index not in self._made:
            path = self._images.name(index)
            try:
                self._made[index] = shrunk(self._images.open(index, self._limits).convert("RGB"), path)
            except BadImage as error:
                self._made[index] = Thumbnail(None, SIDE, SIDE, path, str(error))
        return self._made[index]


def shrunk(image: Image.Image, path: str) -> Thumbnail:
    """Return a thumbnail of an RGB image, which is resized in place."""
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    bare = Image.new("RGB", image.size)
    bare.paste(image)
    buffer = BytesIO()
    bare.save(buffer, "JPEG", quality=QUALITY, optimize=True)
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return Thumbnail(f"data:image/jpeg;base64,{encoded}", *image.size, path)
