"""Where an evaluation's page comes from, as it says itself: the command, the model, the time."""

import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from clip_exp.runs import read_record

CHECKOUT = Path(__file__).resolve().parents[2]  # if this is one: it has the scripts beside the package
KINDS = {
    "zero_shot": "Zero-shot classification",
    "linear_probe": "Linear probe",
    "knn": "Nearest neighbours",
    "retrieval": "Retrieval",
    "robustness": "Robustness",
}


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
    script = CHECKOUT / f"{command}.py"
    program = shutil.which("clip-exp")
    if script.is_file() and Path.cwd() == CHECKOUT:
        words = [_python(), script.name]
    elif program is not None and Path(program).parent == Path(sys.executable).parent:
        words = ["clip-exp", command]
    elif script.is_file():
        words = [_python(), str(script)]
    else:
        words = [_python(), "-m", "clip_exp", command]
    return shlex.join([*words, *arguments])


def _python() -> str:
    """Return how to call this interpreter from here: `python` where that is it."""
    interpreter = Path(sys.executable)
    found = shutil.which("python")
    if found is not None and Path(found) == interpreter:
        return "python"
    here = Path.cwd()
    return str(interpreter.relative_to(here) if interpreter.is_relative_to(here) else interpreter)


def which_weights(protocol: dict[str, Any]) -> str | None:
    """Return which of a run's weights were scored; None of others."""
    step = protocol.get("step")
    averaged = "averaged weights (EMA)" if protocol.get("ema") else None
    return ", ".join(filter(None, [f"step {step:,}" if isinstance(step, int) else None, averaged])) or None


def heading(name: str, protocol: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What the template of every evaluation's page begins and ends with."""
    kind = str(protocol.get("kind", ""))
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
        "kind": KINDS.get(kind, kind.replace("_", " ")),
        "about": [str(part) for part in about if part],
        "made_by": " · ".join(filter(None, made_by)),
        "command": command_of(folder),
    }
