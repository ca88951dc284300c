"""What a table of text looks like: which character separates its columns, whether it has a header, where the columns are."""

import contextlib
import csv
import difflib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from clip_exp.errors import ConfigError, DataError

SEPARATORS = {"\t": "TAB", ",": "comma", ";": "semicolon", "|": "bar"}
_PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")


@dataclass(frozen=True)
class Columns:
    """The columns that are wanted, by the names that the configuration gives them."""

    image_key: str
    caption_key: str | None
    label_key: str | None

    @property
    def settings(self) -> dict[str, str]:
        """Key of the configuration to the name of the column."""
        wanted = {"image_key": self.image_key, "caption_key": self.caption_key, "label_key": self.label_key}
        return {setting: name for setting, name in wanted.items() if name is not None}


@dataclass(frozen=True)
class Layout:
    """How to cut a table into the columns that are wanted.

    Attributes:
        separator: one character.
        header: whether the first record names the columns.
        width: fields in every record.
        indices: key of the configuration to the index of its field.
    """

    separator: str
    header: bool
    width: int
    indices: dict[str, int]


def parse_separator(separator: str) -> str | None:
    """The character that `data.separator` means; None for `auto`.

    Raises: ConfigError for anything but one character.
    """
    if separator == "auto":
        return None
    character = {"\\t": "\t", "tab": "\t", "TAB": "\t"}.get(separator, separator)
    if len(character) != 1 or character in '"\r\n':
        raise ConfigError(f"data.separator={separator!r} must be auto or one character (TAB is written \\t).")
    return character


def find_layout(path: Path, first_lines: Sequence[str], columns: Columns, separator: str | None) -> Layout:
    """The layout of a table from its first lines.

    A header is recognized by the wanted names; a table without one by two columns of which one holds names of pictures.

    Args:
        path: for messages.
        first_lines: some lines from the start, at least one.
        columns: what is wanted.
        separator: a character, or None: whichever fits.

    Raises: DataError where a wanted column is missing or there twice, naming the columns, the nearest and the key to set.
    """
    samples = {candidate: _records(first_lines, candidate) for candidate in ([separator] if separator else SEPARATORS)}
    wanted = columns.settings
    found = {candidate: len(set(wanted.values()) & set(_names(records))) for candidate, records in samples.items()}
    best = max(samples, key=lambda candidate: (found[candidate], _regularity(samples[candidate])))
    if found[best] == 0 and separator is None:
        for candidate, records in samples.items():
            if layout := _without_header(candidate, records, columns):
                return layout
    elif found[best] == 0 and (layout := _without_header(best, samples[best], columns)):
        return layout
    names = _names(samples[best])
    _check_names(path, names, columns, best)
    return Layout(best, True, len(names), {setting: names.index(name) for setting, name in wanted.items()})


def _records(lines: Sequence[str], separator: str) -> list[list[str]]:
    records: list[list[str]] = []
    with contextlib.suppress(csv.Error):  # a field over the limit: the records before it are sample enough
        records.extend(filter(None, csv.reader(lines, delimiter=separator)))
    return records or [[""]]


def _names(records: list[list[str]]) -> list[str]:
    return [name.strip() for name in records[0]]


def _regularity(records: list[list[str]]) -> float:
    """How many records have the commonest number of fields, where that is more than one."""
    width, count = Counter(map(len, records)).most_common(1)[0]
    return count / len(records) if width > 1 else 0.0


def _without_header(separator: str, records: list[list[str]], columns: Columns) -> Layout | None:
    if columns.caption_key is None or columns.label_key is not None or len(records[0]) != 2:
        return None
    pairs = [record for record in records if len(record) == 2]
    counts = [sum(record[i].strip().lower().endswith(_PICTURE_SUFFIXES) for record in pairs) for i in (0, 1)]
    image = 0 if counts[0] >= counts[1] else 1
    enough = counts[image] >= 0.9 * len(pairs) and counts[1 - image] < 0.5 * len(pairs)
    if not enough or not records[0][image].strip().lower().endswith(_PICTURE_SUFFIXES):
        return None
    return Layout(separator, False, 2, {"image_key": image, "caption_key": 1 - image})


def _check_names(path: Path, names: list[str], columns: Columns, separator: str) -> None:
    for setting, name in columns.settings.items():
        if names.count(name) == 1:
            continue
        if name in names:
            raise DataError(
                f"{path} has {names.count(name)} columns called {name!r}: rename one, or set data.{setting}."
            )
        listed = ", ".join(map(repr, names[:20]))
        message = f"{path} has no column {name!r} (data.{setting}). Its columns, separated by {describe(separator)}: {listed}."
        near = difflib.get_close_matches(name.lower(), [other.lower() for other in names], n=1)
        nearest = next((other for other in names if near and other.lower() == near[0]), "<one of them>")
        hint = f" Set data.{setting}={nearest}" if len(names) > 1 else ""
        elsewhere = next((s for s in SEPARATORS if s != separator and len(names) == 1 and s in names[0]), None)
        if elsewhere:
            hint = f" The table looks separated by {describe(elsewhere)}: set data.separator=auto"
        raise DataError(message + (f"{hint}." if hint else ""))


def describe(separator: str) -> str:
    """A separator in words."""
    return SEPARATORS.get(separator, repr(separator))
