"""What the door of a rank does: `python -m <module> <folder>`, started by `ranks.launch`."""

import ctypes
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from clip_exp.errors import ClipExpError
from clip_exp.ranks.environment import ERROR_FILE
from clip_exp.secrets import redact


def serve(work: Callable[[Path], int]) -> None:
    """Do `work` in the folder that the command line names, and end this process with its exit code."""
    run_dir, rank = Path(sys.argv[1]), os.environ["RANK"]
    _end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the work has its own way to stop: no traceback of imports
    try:
        code = work(run_dir)
    except ClipExpError as error:
        code = error.exit_code
        _tell(run_dir, rank, f"error: {error}")
    except Exception:
        code = 1
        _tell(run_dir, rank, f"rank {rank}:\n{traceback.format_exc()}")
    # A collective that other ranks left half-way would keep an orderly exit waiting.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _tell(run_dir: Path, rank: str, message: str) -> None:
    """Leave the message to the launcher, which prints one of all the ranks' messages."""
    (run_dir / ERROR_FILE.format(rank=rank)).write_text(redact(message), encoding="utf-8")


def _end_with_parent() -> None:
    """Linux ends this process when the launcher dies, however it dies."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
