"""A rank's own door: `python -m clip_exp.training.worker <run folder>`, started by `training.launch` or inside its process."""

import ctypes
import logging
import os
import signal
import sys
import traceback
from pathlib import Path

from clip_exp.errors import ClipExpError
from clip_exp.secrets import redact
from clip_exp.training.environment import ERROR_FILE


def work(run_dir: Path) -> int:
    """Train in this process, logging to `train.log`."""
    handler = _log_to(run_dir)
    try:
        from clip_exp.training.run import train

        return train(run_dir)
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()


def _log_to(run_dir: Path) -> logging.Handler:
    """Rank 0 writes everything to `train.log`; warnings go to the terminal too."""
    main = os.environ.get("RANK", "0") == "0"
    root = logging.getLogger()
    root.setLevel(logging.INFO if main else logging.ERROR)
    handler: logging.Handler = (
        logging.FileHandler(run_dir / "train.log", encoding="utf-8") if main else logging.NullHandler()
    )
    handler.setFormatter(RedactingFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root.addHandler(handler)
    logging.captureWarnings(True)
    return handler


class RedactingFormatter(logging.Formatter):
    """No secret of the environment and no credential of an address reaches the log."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def main() -> None:
    run_dir, rank = Path(sys.argv[1]), os.environ["RANK"]
    _end_with_parent()
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


if __name__ == "__main__":
    main()
