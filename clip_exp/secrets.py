"""Keeping secrets out of what a run leaves behind.

An interpolation of a variable that is named like a secret is refused by its name, whatever its value looks like. Values are
searched for only where they look like secrets: a run's files are also text in which an ordinary word must stay.
"""

import os
import re
from collections.abc import Iterator
from typing import Any

WORDS = frozenset(
    {
        "APIKEY", "AUTH", "CREDENTIAL", "CREDENTIALS", "DSN", "JWT", "KEY", "KEYS", "PASS", "PASSPHRASE", "PASSWD", "PASSWORD",
        "PASSWORDS", "PAT", "PRIVATE", "PWD", "SECRET", "SECRETS", "TOKEN", "TOKENS", "WEBHOOK",
    }
)  # fmt: skip
OFTEN_HARMLESS = frozenset({"AUTH", "KEY", "KEYS", "PASS", "PRIVATE", "TOKEN", "TOKENS"})  # IMAGE_KEY=filepath
WORD_ENDS = ("APIKEY", "PASSPHRASE", "PASSWD", "PASSWORD")  # PGPASSWORD is one word
PLACES = frozenset(
    {"DIR", "FILE", "FOLDER", "HOME", "PATH", "ROOT", "SOCK"}
)  # last word of a variable that holds a path
NO_SECRETS = frozenset({"PWD", "OLDPWD"})  # the shell's folders
PLAIN_KEYS = frozenset({"KEYS", "PASS", "PRIVATE", "TOKENS"})  # also arguments of callbacks: ignore_keys, num_tokens
OPEN_NODES = (
    "callbacks.extra.",
    "logger.extra.",
    "optimizer.kwargs.",
    "scheduler.kwargs.",
)  # whose keys no schema knows
SHORTEST = 8  # characters of a secret; shorter values are switches
# From the beginning of a word, and with a limit: a long text without an address must not take long.
URL_CREDENTIALS = re.compile(r"\b(\w+://)(?:[^\s/@:]{1,4096}:[^\s<>\"']{0,4096}@|[^\s/@<>\"']{1,4096}@)")


def redact(text: str) -> str:
    """Take out credentials in addresses, and the values of environment variables whose names look like secrets'."""
    for value in secret_values().values():
        text = text.replace(value, "***")
    return URL_CREDENTIALS.sub(r"\1***@", text)


def names_secret(name: str) -> bool:
    """Return whether a variable's name has a word such as KEY or TOKEN between its underscores."""
    return name.upper() not in NO_SECRETS and bool(_secret_words(name))


def secret_values() -> dict[str, str]:
    """Return the environment variables that hold secrets, by name, the longest first.

    Words and paths are none, whatever their variable is called. Of two values of which one is part of the other, the longer must
    be replaced first.
    """
    found = {name: value for name, value in os.environ.items() if names_secret(name) and _looks_secret(name, value)}
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def _words(name: str) -> list[str]:
    """`GITHUB_TOKEN2` -> GITHUB, TOKEN."""
    return [word.rstrip("0123456789") for word in re.split(r"[^A-Z0-9]+", name.upper())]


def _secret_words(name: str) -> set[str]:
    return {word for word in _words(name) if word in WORDS or word.endswith(WORD_ENDS)}


def _looks_secret(name: str, value: str) -> bool:
    if len(value) < SHORTEST or _words(name)[-1] in PLACES:
        return False
    if value.startswith("/") and os.path.lexists(value):  # base64 may begin with a slash, too
        return False
    if any(c.isdigit() for c in value):
        return True
    a_word = value.replace("_", "").isalpha() and (value.islower() or value.isupper())
    return not a_word and not _secret_words(name) <= OFTEN_HARMLESS


def texts(values: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield every text in a configuration, or a part of it, with its dotted key; those of a list have that of the list.

    Args:
        values: nested dictionaries and lists of plain values.
        key: where they stand in the configuration.
    """
    if isinstance(values, dict):
        for name, value in values.items():
            yield from texts(value, f"{key}.{name}" if key else str(name))
    elif isinstance(values, list):
        for value in values:
            yield from texts(value, key)
    elif isinstance(values, str):
        yield key, values


def leaks(values: Any, below: str = "") -> Iterator[str]:
    """Yield a sentence for every configured value that holds a secret; the secret itself is not in it.

    Args:
        values, below: see `texts`, where `below` is `key`.
    """
    for key, text in texts(values, below):
        if key.startswith(OPEN_NODES) and _words(key)[-1] in WORDS - PLAIN_KEYS:
            yield f"{key} would be kept in the run's folder: give it through the environment."
        if URL_CREDENTIALS.search(text):
            yield f"{key} holds the credentials of an address, and a run's folder keeps its configuration: give them another way."
        for name, secret in secret_values().items():
            if secret in text:
                yield f"{key} holds the value of the environment variable {name}, and a run's folder keeps its configuration: leave it in the environment."
