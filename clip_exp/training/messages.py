"""Messages of a run: what a process logs goes to `train.log` and, where it is clip_exp's own, to the terminal too.

Training logs instead of printing, so that the log holds what a person saw. Warnings and errors go to standard error, the rest to
standard output. A message logged with `extra=LOG_ONLY` is in `train.log` alone: the terminal shows the same in another way.
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
def shown_and_kept() -> Iterator[list[logging.LogRecord]]:
    """Inside, before there is a run folder, rank 0 logs to the terminal and to a list, for `train.log`."""
    own, kept = logging.getLogger("clip_exp"), BufferingHandler(sys.maxsize)
    handlers = [_Terminal(), kept] if is_first_rank() else [logging.NullHandler()]
    level = own.level
    own.setLevel(logging.INFO)
    for handler in handlers:
        own.addHandler(handler)
    try:
        yield kept.buffer
    finally:
        own.setLevel(level)
        for handler in handlers:
            own.removeHandler(handler)


@contextmanager
def logging_to(folder: Path, earlier: Sequence[logging.LogRecord] = ()) -> Iterator[None]:
    """Inside, rank 0 logs to `train.log` of a run folder and to the terminal, failures of libraries' threads too.

    Other ranks log nothing.

    Args:
        earlier: what the terminal has shown already; the log begins with it.
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
            with suppress(OSError):  # of a full disk
                handler.close()


def _log_thread(failed: threading.ExceptHookArgs) -> None:
    """Log what ended a thread, such as TensorBoard's writer on a full disk: the terminal gets a line, the log the traceback."""
    name = failed.thread.name if failed.thread else "a thread"
    about = (failed.exc_type, failed.exc_value or failed.exc_type(), failed.exc_traceback)
    log.warning("%s failed: %s", name, failed.exc_value, exc_info=about)


class _LogFile(logging.FileHandler):
    """A log file whose failure is reported once and does not end the run. What a full disk refused is tried again with the next message."""

    reported = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exception()
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self.reported:
            self.reported = True
            _print_unwritable(Path(self.baseFilename), error)


class _Terminal(logging.Handler):
    """The terminal. One that is gone, or a full disk behind it, does not end the run."""

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
    """A formatter that keeps secrets of the environment and credentials of addresses out of the log."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def _print_unwritable(path: Path, error: OSError) -> None:
    with suppress(OSError):
        print(f"warning: {path} cannot be written: {error.strerror or error}. Training continues.", file=sys.stderr)
