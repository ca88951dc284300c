"""What a table of text looks like: which character separates its columns, whether it has a header, where the columns are."""

import contextlib
import csv
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from clip_exp.data.tables import filters
from clip_exp.data.tables.reader import TableOptions, no_column
from clip_exp.errors import ConfigError, DataError

SEPARATORS = {"\t": "TAB", ",": "comma", ";": "semicolon", "|": "bar"}
_PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")


@dataclass(frozen=True)
class Columns:
    """The columns that are wanted.

    Attributes:
        settings: key of the configuration (`image_key`, …) to the name of the column.
        filtered: names that `data.filter` uses.
    """

    settings: dict[str, str]
    filtered: frozenset[str]

    @classmethod
    def of(cls, options: TableOptions) -> "Columns":
        return cls(options.wanted, filters.parse(options.filter).names if options.filter else frozenset())


@dataclass(frozen=True)
class Layout:
    """How to cut a table into the columns that are wanted.

    Attributes:
        separator: one character.
        header: whether the first record names the columns.
        width: fields in every record.
        indices: key of the configuration to the index of its field.
        extra: name that the filter uses to the index of its field.
        names: of the wanted columns, by key of the configuration.
    """

    separator: str
    header: bool
    width: int
    indices: dict[str, int]
    names: dict[str, str]
    extra: dict[str, int] = field(default_factory=dict)

    @property
    def wanted(self) -> list[int]:
        """Indices of all fields that are read, ascending."""
        return sorted({*self.indices.values(), *self.extra.values()})


def parse_separator(separator: str) -> str | None:
    """The character that `data.separator` means; None for `auto`.

    Raises: ConfigError for anything but one character.
    """
    if separator == "auto":
        return None
    character = {"\\t": "\t", "tab": "\t", "TAB": "\t"}.get(separator, separator)
    if len(character) != 1 or character in '"\r\n\0':
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
    indices = {setting: names.index(name) for setting, name in wanted.items()}
    extra = {name: names.index(name) for name in sorted(columns.filtered)}
    return Layout(best, True, len(names), indices, wanted, extra)


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
    if set(columns.settings) != {"image_key", "caption_key"} or columns.filtered or len(records[0]) != 2:
        return None
    pairs = [record for record in records if len(record) == 2]
    counts = [sum(record[i].strip().lower().endswith(_PICTURE_SUFFIXES) for record in pairs) for i in (0, 1)]
    image = 0 if counts[0] >= counts[1] else 1
    enough = counts[image] >= 0.9 * len(pairs) and counts[1 - image] < 0.5 * len(pairs)
    if not enough or not records[0][image].strip().lower().endswith(_PICTURE_SUFFIXES):
        return None
    return Layout(separator, False, 2, {"image_key": image, "caption_key": 1 - image}, columns.settings)


def _check_names(path: Path, names: list[str], columns: Columns, separator: str) -> None:
    for setting, name in [*columns.settings.items(), *(("filter", name) for name in sorted(columns.filtered))]:
        if names.count(name) > 1:
            repair = "rename one" if setting == "filter" else f"rename one, or set data.{setting}"
            raise DataError(f"{path} has {names.count(name)} columns called {name!r}: {repair}.")
        if name not in names:
            raise DataError(f"{path} {_missing(name, setting, names, separator)}")


def _missing(name: str, setting: str, names: list[str], separator: str) -> str:
    message = no_column(name, setting, names)
    if len(names) > 1:
        return message.replace("Its columns:", f"Its columns, separated by {describe(separator)}:")
    other = next((other for other in SEPARATORS if other != separator and other in names[0]), None)
    if other is None:
        between = " If that is more than one column, set data.separator to the character between them."
        return message + between * (name in names[0])
    return f"{message} The table looks separated by {describe(other)}: set data.separator=auto."


def describe(separator: str) -> str:
    """A separator in words."""
    return SEPARATORS.get(separator, repr(separator))
