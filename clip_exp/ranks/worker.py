"""Entry point of a rank that `ranks.launch` started: `python -m clip_exp.ranks.worker <module>:<function> <folder>`."""

import ctypes
import importlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from clip_exp.ranks.failure import Reporter, exit_on_signals, place_in, reporting_to


def command_line(work: Callable[[Path], int], folder: Path) -> list[str]:
    """Return the command that calls a module's function with a folder in a process of its own, and ends it with the result."""
    return [sys.executable, "-m", __name__, f"{work.__module__}:{work.__qualname__}", str(folder)]


def main() -> NoReturn:
    """Call the function that the command line names, and end this process with its exit code or that of its failure."""
    module, function = sys.argv[1].split(":")
    folder, rank = Path(sys.argv[2]), int(os.environ["RANK"])
    if sys.platform == "linux":  # ends this process when the launcher dies, however it dies
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    reporter = Reporter(folder, rank)
    # Until the work has its own way to stop, a signal ends this rank at once: there is nothing yet that could be lost.
    with exit_on_signals(silent=rank > 0), reporting_to(reporter):
        try:
            with place_in(folder, rank):
                code = getattr(importlib.import_module(module), function)(folder)
        except BaseException as error:
            code = reporter.report(error).code
    # A collective that other ranks left half-way would keep an orderly exit waiting.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
