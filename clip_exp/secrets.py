"""Keeping secrets out of what a run leaves behind."""

import os
import re
from collections.abc import Iterator
from typing import Any

SECRET_NAME = re.compile(r"(^|_)(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$", re.IGNORECASE)
OPEN_NODES = (
    "callbacks.extra.",
    "logger.extra.",
    "optimizer.kwargs.",
    "scheduler.kwargs.",
)  # whose keys no schema knows
SHORTEST = 8  # characters of a secret; shorter values are switches
URL_CREDENTIALS = re.compile(r"(\w+://)(?:[^\s/@:]+:[^\s<>\"']*@|[^\s/@<>\"']+@)")


def redact(text: str) -> str:
    """Take out credentials in addresses, and the values of environment variables whose names look like secrets'."""
    for value in secret_values().values():
        text = text.replace(value, "***")
    return URL_CREDENTIALS.sub(r"\1***@", text)


def secret_values() -> dict[str, str]:
    """The environment variables that hold secrets, by name: words and paths are none, whatever their variable is called."""
    return {name: value for name, value in os.environ.items() if SECRET_NAME.search(name) and _looks_secret(value)}


def _looks_secret(value: str) -> bool:
    return len(value) >= SHORTEST and "/" not in value[:1] and any(c.isdigit() for c in value)


def leaks(values: Any, key: str = "") -> Iterator[str]:
    """A sentence for every configured value that holds a secret; the secret itself is not in it.

    Args:
        values: nested dictionaries and lists of plain values.
        key: where they stand in the configuration.
    """
    if isinstance(values, dict):
        for name, value in values.items():
            yield from leaks(value, f"{key}.{name}" if key else str(name))
    elif isinstance(values, list):
        for value in values:
            yield from leaks(value, key)
    elif isinstance(values, str):
        if key.startswith(OPEN_NODES) and SECRET_NAME.search(key.rpartition(".")[2]):
            yield f"{key} would be kept in the run's folder: give it through the environment."
        if URL_CREDENTIALS.search(values):
            yield f"{key} holds the credentials of an address, and a run's folder keeps its configuration: give them another way."
        for name, secret in secret_values().items():
            if secret in values:
                yield f"{key} holds the value of the environment variable {name}, and a run's folder keeps its configuration: leave it in the environment."
