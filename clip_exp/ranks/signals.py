"""Stop signals: one handler for raising where the program is, for noting a request until a step ends, and for passing it on."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from clip_exp.errors import PREEMPTED_EXIT_CODE

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)  # ask a run to save and end
REPEAT_S = 5.0  # launchers and process groups deliver the same request twice


class Stopped(BaseException):
    """A signal asked this process to end. Not an Exception: no caller should take it for a failure of its own."""


class StopRequest:
    """Request to stop, by a signal that may have been received."""

    def __init__(self) -> None:
        self.received = False


@contextmanager
def handle_signals(receive: Callable[[int], None]) -> Iterator[None]:
    """Inside, every stop signal calls `receive` with its number; the handlers from before are restored on leaving.

    Outside the main thread, where Python sets no handlers, signals are left alone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handler(number: int, frame: FrameType | None) -> None:
        receive(number)

    before = {number: signal.signal(number, handler) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


@contextmanager
def exit_on_signals(*, silent: bool = False) -> Iterator[None]:
    """Inside, a stop signal ends the process at once, as preempted: for the time before there is anything to save.

    Args:
        silent: print nothing, since another rank does.
    """

    def end(number: int) -> None:
        if not silent:
            name = signal.Signals(number).name
            message = f"stopped by {name} before the work began; the same command starts it.\n"
            os.write(sys.stderr.fileno(), message.encode())
        os._exit(PREEMPTED_EXIT_CODE)

    with handle_signals(end):
        yield


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """Inside, a stop signal raises `Stopped` where the program is; a later second one ends the process at once."""

    def stop(number: int) -> None:
        raise Stopped(f"stopped by {signal.Signals(number).name}.")

    with handle_signals(_first(stop)):
        yield


@contextmanager
def note_signals() -> Iterator[StopRequest]:
    """Inside, a stop signal is noted in the request, for the program to act on; a later second one ends the process at once."""
    request = StopRequest()

    def note(number: int) -> None:
        request.received = True

    with handle_signals(_first(note)):
        yield request


def _first(action: Callable[[int], None]) -> Callable[[int], None]:
    """Return a receiver that acts on the first signal, ignores repetitions of it, and ends the process on a later one."""
    first_s: float | None = None

    def receive(number: int) -> None:
        nonlocal first_s
        now_s = time.monotonic()
        if first_s is None:
            first_s = now_s
            action(number)
        elif now_s - first_s > REPEAT_S:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    return receive
