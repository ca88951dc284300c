"""Errors that a user can act on; each class carries the exit code that the command line ends with.

A message says what is wrong, where, and how to fix it. It is printed once, at the door (`clip_exp.cli`), without a traceback.
"""

import difflib
import re
from collections.abc import Iterable
from typing import Any

PREEMPTED_EXIT_CODE = 143
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # line ends and tabs are left


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return a sentence that helps after a typo: the closest valid name, or all of them where none is close."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"valid: {', '.join(names)}."


def printable(message: str) -> str:
    """A message without the characters at which a terminal would act: names in somebody's file may hold any."""
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", message)


class ClipExpError(Exception):
    """An expected error."""

    exit_code = 1


class ConfigError(ClipExpError):
    """The configuration cannot work: an unknown key, a wrong type, values that contradict each other."""

    exit_code = 2


class DataError(ClipExpError):
    """The data cannot be used: a missing column, broken rows, unreadable images."""

    exit_code = 3


class CheckpointError(ClipExpError):
    """A checkpoint or the storage under it is missing, damaged or does not fit."""

    exit_code = 4


class NumericError(ClipExpError):
    """Training left the finite numbers."""

    exit_code = 5


class DistributedError(ClipExpError):
    """A process of a distributed run died or could not be reached."""

    exit_code = 6


class DeviceMemoryError(ClipExpError):
    """A device or the machine has too little memory for what was asked of it."""

    exit_code = 7


def gravest(errors: list[ClipExpError]) -> ClipExpError:
    """One error with a line for each of several, of the class whose exit code is the lowest."""
    return type(min(errors, key=lambda error: error.exit_code))("\n".join(str(error) for error in errors))


class Problems:
    """A collection of what is wrong, so that all of it is reported at once."""

    def __init__(self) -> None:
        self.errors: list[ClipExpError] = []

    def add(self, *messages: str) -> None:
        """Problems of the configuration."""
        self.errors += [ConfigError(message) for message in messages]

    def __enter__(self) -> "Problems":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> bool:
        """An expected error is kept, and what follows the block goes on."""
        if isinstance(error, ClipExpError):
            self.errors.append(error)
            return True
        return False

    def tell(self) -> None:
        """Raises:
        ClipExpError: of the class of the gravest problem, with a line for every problem, if there are any.
        """
        if self.errors:
            raise gravest(self.errors)
