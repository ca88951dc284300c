"""Detection of secrets, to keep them out of the files of a run.

Interpolating an environment variable whose name looks like that of a secret is an error, whatever its value. Values of
such variables are removed from files only if they look like secrets too, since a value may also be an ordinary word.
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
# Words that also occur in names of ordinary variables, such as IMAGE_KEY=filepath
OFTEN_HARMLESS = frozenset({"AUTH", "KEY", "KEYS", "PASS", "PRIVATE", "TOKEN", "TOKENS"})
# Ends of words, such as PGPASSWORD
WORD_ENDS = ("APIKEY", "PASSPHRASE", "PASSWD", "PASSWORD")
# Last word of the name of a variable with a path
PLACES = frozenset({"DIR", "FILE", "FOLDER", "HOME", "PATH", "ROOT", "SOCK"})
# The shell's working directories
NO_SECRETS = frozenset({"PWD", "OLDPWD"})
# Words that also occur in arguments of callbacks, such as ignore_keys and num_tokens
PLAIN_KEYS = frozenset({"KEYS", "PASS", "PRIVATE", "TOKENS"})
# Nodes whose keys are not in the schema
OPEN_NODES = (
    "callbacks.extra.", "logger.extra.", "optimizer.", "scheduler.", "loss.", "model.image.", "model.text.", "data.transform.",
)  # fmt: skip
# Nodes with keys of the schema and the arguments of a user's object, and the former that sound like secrets
PARTLY_OPEN_NODES = ("data.", "task.")
OF_TABLES = frozenset({"image_key", "caption_key", "label_key"})
# Minimum number of characters of a secret; shorter values are switches
SHORTEST = 8
# The word boundary and the limits keep the search fast in long texts without URLs.
URL_CREDENTIALS = re.compile(r"\b(\w+://)(?:[^\s/@:]{1,4096}:[^\s<>\"']{0,4096}@|[^\s/@<>\"']{1,4096}@)")


def redact(text: str) -> str:
    """Replace the credentials in URLs and the values of secret environment variables by `***`."""
    for value in secret_values().values():
        text = text.replace(value, "***")
    return URL_CREDENTIALS.sub(r"\1***@", text)


def names_secret(name: str) -> bool:
    """Return True if a word in the name of a variable is KEY, TOKEN or the like."""
    return name.upper() not in NO_SECRETS and bool(_secret_words(name))


def secret_values() -> dict[str, str]:
    """Return the environment variables with secrets, longest value first.

    Values that are words or paths do not count as secrets, whatever the name of the variable. The order matters for
    replacement: if a value contains another one, the longer must be replaced first.
    """
    found = {name: value for name, value in os.environ.items() if names_secret(name) and _looks_secret(name, value)}
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def _words(name: str) -> list[str]:
    """Split a name into words: `GITHUB_TOKEN2` -> GITHUB, TOKEN."""
    return [word.rstrip("0123456789") for word in re.split(r"[^A-Z0-9]+", name.upper())]


def _secret_words(name: str) -> set[str]:
    return {word for word in _words(name) if word in WORDS or word.endswith(WORD_ENDS)}


def _looks_secret(name: str, value: str) -> bool:
    if len(value) < SHORTEST or _words(name)[-1] in PLACES:
        return False
    # Base64 may also start with a slash.
    if value.startswith("/") and os.path.lexists(value):
        return False
    if any(c.isdigit() for c in value):
        return True
    a_word = value.replace("_", "").isalpha() and (value.islower() or value.isupper())
    return not a_word and not _secret_words(name) <= OFTEN_HARMLESS


def texts(values: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield the full key and the value of every string in a configuration. Entries of a list have the key of the list.

    Args:
        values: configuration, or a part of it, as nested dictionaries and lists.
        key: full key of `values`; empty for a whole configuration.
    """
    if isinstance(values, dict):
        for name, value in values.items():
            yield from texts(value, f"{key}.{name}" if key else str(name))
    elif isinstance(values, list):
        for value in values:
            yield from texts(value, key)
    elif isinstance(values, str):
        yield key, values


def leaks(values: Any, key: str = "") -> Iterator[str]:
    """Yield an error message, without the secret, for every value of a configuration that contains a secret.

    Args:
        values: configuration, or a part of it, as nested dictionaries and lists.
        key: full key of `values`; empty for a whole configuration.
    """
    for full_key, text in texts(values, key):
        if _is_argument(full_key) and _words(full_key)[-1] in WORDS - PLAIN_KEYS:
            yield f"{full_key} looks like a secret, and would be saved in the run folder: set it in the environment instead."
        if URL_CREDENTIALS.search(text):
            yield f"{full_key} contains a URL with credentials, which would be saved in the run folder: pass the credentials another way."
        for name, secret in secret_values().items():
            if secret in text:
                yield (
                    f"{full_key} contains the value of the environment variable {name}, which would be saved in the run folder: leave "
                    "the value in the environment."
                )


def _is_argument(full_key: str) -> bool:
    """Return True if a key may be an argument of a user's object."""
    known = full_key.rpartition(".")[2] in OF_TABLES
    return full_key.startswith(OPEN_NODES) or (full_key.startswith(PARTLY_OPEN_NODES) and not known)
