"""Logging of a run: all records of the process go to `train.log`, and those of clip_exp to the terminal too.

Training logs instead of printing, so that the log contains everything that the user saw. Warnings and errors go to standard error,
other records to standard output. A record with `extra=LOG_ONLY` goes only to `train.log`, because the terminal shows it differently.
"""

import logging
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from logging.handlers import BufferingHandler
from pathlib import Path

from clip_exp.errors import printable
from clip_exp.ranks.environment import is_first_rank
from clip_exp.secrets import redact

log = logging.getLogger(__name__)
LOG_ONLY = {"on_terminal": False}


@contextmanager
def buffered_logging() -> Iterator[list[logging.LogRecord]]:
    """Log to the terminal and to a list on rank 0, while there is no run folder yet; `train.log` starts with that list."""
    own, buffered = logging.getLogger("clip_exp"), BufferingHandler(sys.maxsize)
    handlers = [_Terminal(), buffered] if is_first_rank() else [logging.NullHandler()]
    level = own.level
    own.setLevel(logging.INFO)
    for handler in handlers:
        own.addHandler(handler)
    try:
        yield buffered.buffer
    finally:
        own.setLevel(level)
        for handler in handlers:
            own.removeHandler(handler)


@contextmanager
def logging_to(folder: Path, earlier: Sequence[logging.LogRecord] = ()) -> Iterator[None]:
    """Log to `train.log` of a run folder and to the terminal on rank 0, including failures of threads; other ranks log nothing.

    Args:
        folder: the run folder.
        earlier: records that the terminal has already shown, written to the start of the log.
    """
    root, own = logging.getLogger(), logging.getLogger("clip_exp")
    main = is_first_rank()
    root.setLevel(logging.INFO if main else logging.ERROR)
    logging.captureWarnings(True)
    file: logging.Handler = logging.NullHandler()
    if main:
        path = folder / "train.log"
        try:
            file = _LogFile(path, encoding="utf-8")
            file.setFormatter(_Redacting("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        except OSError as error:
            _print_unwritable(path, error)
    added = [(root, file), (own, _Terminal())] if main else [(root, file)]
    for record in earlier:
        file.handle(record)
    for logger, handler in added:
        logger.addHandler(handler)
    before = threading.excepthook
    if main:
        threading.excepthook = _log_thread
    try:
        yield
    finally:
        threading.excepthook = before
        for logger, handler in added:
            logger.removeHandler(handler)
            with suppress(OSError):  # disk full
                handler.close()


def _log_thread(failed: threading.ExceptHookArgs) -> None:
    """Log the exception of a thread, such as TensorBoard's writer on a full disk: one line on the terminal, the traceback in the log."""
    name = failed.thread.name if failed.thread else "a thread"
    about = (failed.exc_type, failed.exc_value or failed.exc_type(), failed.exc_traceback)
    log.warning("%s failed: %s", name, failed.exc_value, exc_info=about)


class _LogFile(logging.FileHandler):
    """Log file whose failure is reported once and does not end the run. Writing is retried with the next record."""

    reported = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exception()
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self.reported:
            self.reported = True
            _print_unwritable(Path(self.baseFilename), error)


class _Terminal(logging.Handler):
    """Handler for the terminal. A closed terminal, or output redirected to a full disk, does not end the run."""

    def emit(self, record: logging.LogRecord) -> None:
        if not getattr(record, "on_terminal", True):
            return
        with suppress(OSError):
            text = printable(redact(record.getMessage()))
            if record.levelno >= logging.WARNING:
                print(f"{record.levelname.lower()}: {text}", file=sys.stderr, flush=True)
            else:
                print(text, flush=True)


class _Redacting(logging.Formatter):
    """Formatter that removes secrets of the environment and credentials in URLs."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def _print_unwritable(path: Path, error: OSError) -> None:
    with suppress(OSError):
        print(f"warning: {path} cannot be written: {error.strerror or error}. Training continues.", file=sys.stderr)
