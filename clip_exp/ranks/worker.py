"""Entry point of a rank that `ranks.launch` started: `python -m clip_exp.ranks.worker <module>:<function> <folder>`."""

import ctypes
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from clip_exp.errors import ClipExpError
from clip_exp.secrets import redact


def command_line(work: Callable[[Path], int], folder: Path) -> list[str]:
    """Return the command that calls a module's function with a folder in a process of its own, and ends it with the result."""
    return [sys.executable, "-m", __name__, f"{work.__module__}:{work.__qualname__}", str(folder)]


def error_file(folder: Path, rank: int | str) -> Path:
    """Return where a failing rank leaves its message for the launcher."""
    return folder / f".error-rank{rank}"


def main() -> NoReturn:
    """Call the function that the command line names, and end this process with its exit code or that of its failure."""
    module, function = sys.argv[1].split(":")
    folder, rank = Path(sys.argv[2]), os.environ["RANK"]
    _end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the work has its own way to stop: no traceback of imports
    try:
        code = getattr(importlib.import_module(module), function)(folder)
    except ClipExpError as error:
        code = error.exit_code
        _leave(folder, rank, f"error: {error}")
    except Exception:
        code = 1
        _leave(folder, rank, f"rank {rank}:\n{traceback.format_exc()}")
    # A collective that other ranks left half-way would keep an orderly exit waiting.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _leave(folder: Path, rank: str, message: str) -> None:
    """Leave the message to the launcher, which prints one of all the ranks' messages."""
    error_file(folder, rank).write_text(redact(message), encoding="utf-8")


def _end_with_parent() -> None:
    """Make Linux end this process when the launcher dies, however it dies."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


if __name__ == "__main__":
    main()
