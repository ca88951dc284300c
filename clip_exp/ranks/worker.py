"""Entry point of ranks that `ranks.launch` starts: `python -m clip_exp.ranks.worker <module>:<function> <folder>`."""

import importlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from clip_exp.ranks.failure import Reporter, exit_on_signals, lock_rank, reporting_to
from clip_exp.ranks.watchdog import signal_at_end_of_parent


def command_line(work: Callable[[Path], int], folder: Path) -> list[str]:
    """Return the command that calls a module-level function with a folder in a new process; its result is the exit code."""
    return [sys.executable, "-m", __name__, f"{work.__module__}:{work.__qualname__}", str(folder)]


def main() -> NoReturn:
    """Call the function named on the command line, and exit with its result, or with the exit code of its failure."""
    module, function = sys.argv[1].split(":")
    folder, rank = Path(sys.argv[2]), int(os.environ["RANK"])
    signal_at_end_of_parent(signal.SIGKILL)
    reporter = Reporter(folder, rank)
    # Until the work installs its own handlers, a signal ends this rank immediately: nothing can be lost yet.
    with exit_on_signals(silent=rank > 0), reporting_to(reporter):
        try:
            with lock_rank(folder, rank):
                code = getattr(importlib.import_module(module), function)(folder)
        except BaseException as error:
            code = reporter.report(error).code
    # Skip the normal exit: it would wait for collectives that other ranks have left.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
