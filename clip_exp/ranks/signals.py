"""Ending work that saves as it goes when a signal asks for it."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from clip_exp.ranks.environment import STOP_SIGNALS

REPEAT_S = 5.0  # launchers and process groups deliver the same request twice


class Stopped(BaseException):
    """A signal asked this process to end. No Exception: nothing on the way should take it for a failure of its own."""


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """Inside, a stop signal raises `Stopped` where the program is; a later second one ends the process at once.

    Outside the main thread signals are left alone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked_s: float | None = None

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal asked_s
        if asked_s is None:
            asked_s = time.monotonic()
            raise Stopped(f"stopped by {signal.Signals(number).name}.")
        if time.monotonic() - asked_s > REPEAT_S:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    handlers = {number: signal.signal(number, stop) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
