"""Errors that a user can act on, each with the exit code of the command line.

A message says what is wrong, where, and how to fix it. The command line (`clip_exp.cli`) prints it once, without a
traceback.
"""

import difflib
import re
from collections.abc import Iterable
from typing import Any

PREEMPTED_EXIT_CODE = 143
# Control characters except line feed and tab
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return a hint after an unknown name: the closest valid name, or all valid names if none is close."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"valid names are {', '.join(names)}."


def printable(message: str) -> str:
    """Escape control characters in a message, since names from third-party files may contain terminal escape sequences."""
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", message)


class ClipExpError(Exception):
    """Base class of errors that a user can act on."""

    exit_code = 1


class ConfigError(ClipExpError):
    """Error in the configuration: an unknown key, a wrong type, or values that contradict each other."""

    exit_code = 2


class DataError(ClipExpError):
    """Error in the data: a missing column, malformed rows, or unreadable images."""

    exit_code = 3


class SampleError(DataError):
    """Error in a sample, which a worker process of a DataLoader may raise."""

    def __init__(self, message: str) -> None:
        # A DataLoader re-raises the error of a worker with the worker's traceback as the message. Keep only the
        # original message.
        super().__init__(message.rpartition(f"{type(self).__qualname__}: ")[2].strip())


class CheckpointError(ClipExpError):
    """Error in a checkpoint or its storage: missing, damaged, or incompatible."""

    exit_code = 4


class NumericError(ClipExpError):
    """Error raised when training produces values that are not finite."""

    exit_code = 5


class DistributedError(ClipExpError):
    """Error raised when a process of a distributed run died or cannot be reached."""

    exit_code = 6


class DeviceMemoryError(ClipExpError):
    """Error raised when a device or the machine runs out of memory."""

    exit_code = 7


def gravest(errors: list[ClipExpError]) -> ClipExpError:
    """Merge errors into one with a line for each, of the class with the lowest exit code."""
    if len(errors) == 1:
        return errors[0]
    return type(min(errors, key=lambda error: error.exit_code))("\n".join(dict.fromkeys(map(str, errors))))


class Problems:
    """Collection of errors that are reported all at once.

    Used as a context manager, it collects the `ClipExpError` that the block raises, and execution continues after the
    block.
    """

    def __init__(self) -> None:
        self.errors: list[ClipExpError] = []

    def add(self, *messages: str) -> None:
        """Add a `ConfigError` for each message."""
        self.errors += [ConfigError(message) for message in messages]

    def __enter__(self) -> "Problems":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> bool:
        """Collect a `ClipExpError`; let other exceptions propagate."""
        if isinstance(error, ClipExpError):
            self.errors.append(error)
            return True
        return False

    def raise_if_any(self) -> None:
        """Raise the collected errors as one.

        Raises:
            ClipExpError: there are errors; the class is that of the gravest one, and the message has a line for each.
        """
        if self.errors:
            raise gravest(self.errors)
