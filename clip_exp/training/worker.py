"""A rank's own door: `python -m clip_exp.training.worker <run folder>`, started by `training.launch` or inside its process."""

import logging
import os
from pathlib import Path

from clip_exp.ranks.worker import serve
from clip_exp.secrets import redact


def work(run_dir: Path) -> int:
    """Train in this process, logging to `train.log`."""
    handler = _log_to(run_dir)
    try:
        from clip_exp.training.fit import train

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


if __name__ == "__main__":
    serve(work)
