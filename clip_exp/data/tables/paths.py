"""Which files a configuration names: paths, globs and brace patterns."""

import glob
import os
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from braceexpand import braceexpand

from clip_exp.errors import ConfigError

_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)")
MAX_FILES = 1_000_000  # of one pattern: {0..999999999} is a slip
_LISTED = 3  # of several problems


def expand(tables: str | Path | Sequence[str | Path]) -> list[Path]:
    """The files that are named, in the order that they are named in; those of a glob in the order of their names.

    Args:
        tables: one or several paths, globs (`shards/*.tar`, `**` for any folders) and brace patterns (`{0000..0019}`,
            `{a,b}`), which may hold globs. A file that is called like a pattern is that file.

    Raises: ConfigError for what does not exist or is no file, for a glob that finds nothing, for a file that is named twice.
    """
    named = [tables] if isinstance(tables, str | Path) else list(tables)
    files: list[Path] = []
    problems: list[str] = []
    for entry in named:
        if not isinstance(entry, str | Path):
            raise ConfigError(f"{entry!r} is no path of a table.")
        for pattern in _braces(str(entry)):
            found = _files(pattern)
            files += found
            problems += [] if found else [_missing(pattern)]
    if problems:
        more = f"\n… and {len(problems) - _LISTED} more." if len(problems) > _LISTED else ""
        raise ConfigError("\n".join(problems[:_LISTED]) + more)
    if not files:
        raise ConfigError(
            "No table was given: name a file, a pattern (shards/*.tar, {0000..0019}.tar) or a list of them."
        )
    _check_distinct(files)
    return files


def _braces(entry: str) -> list[str]:
    if "://" in entry:
        raise ConfigError(f"{entry} is an address: tables are read from files; download it first.")
    path = os.path.expanduser(entry)
    if "{" not in path or os.path.lexists(path):
        return [path]
    try:
        large = any(abs(int(last) - int(first)) >= MAX_FILES for first, last in _RANGE.findall(path))
        names = [] if large else list(islice(braceexpand(path, escape=False), MAX_FILES + 1))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{entry} is no pattern: write {{0000..0019}} or {{a,b}}, each brace closed.") from error
    if large or len(names) > MAX_FILES:  # braceexpand makes all numbers of a range at once
        raise ConfigError(f"{entry} names more than {MAX_FILES:,} files.")
    return names


def _files(pattern: str) -> list[Path]:
    """What a path or a glob finds; nothing where it finds no file."""
    if os.path.isfile(pattern):
        return [Path(pattern)]
    if not glob.has_magic(pattern):
        return []
    # With two `**` several ways lead to one file.
    return sorted({Path(name) for name in _glob(pattern) if os.path.isfile(name)})


def _glob(pattern: str) -> Iterator[str]:
    """As `glob.iglob`, which goes through two links that lead back to their folder without end."""
    if pattern.endswith(f"{os.sep}**"):
        pattern = os.path.join(pattern, "*")
    head, found, rest = pattern.partition(f"**{os.sep}")
    if not found or not (head.endswith(os.sep) or not head):
        yield from glob.iglob(pattern)
        return
    seen: set[tuple[int, int]] = set()
    for top in sorted(glob.iglob(head)) if head else [os.curdir]:
        for folder in _folders(top, seen):
            yield from _glob(os.path.join(glob.escape(folder), rest))


def _folders(top: str, seen: set[tuple[int, int]]) -> Iterator[str]:
    """A folder and those below it but for hidden ones, each once, whatever links lead to it."""
    for folder, names, _ in os.walk(top, followlinks=True):
        try:
            status = os.stat(folder)
        except OSError:  # removed meanwhile
            continue
        if (place := (status.st_dev, status.st_ino)) in seen:
            names.clear()
            continue
        seen.add(place)
        names[:] = sorted(name for name in names if not name.startswith("."))
        yield folder


def _missing(pattern: str) -> str:
    if os.path.isdir(pattern):
        return f"The table {pattern} is not a file: it is a folder{_inside(pattern)}."
    if os.path.lexists(pattern):
        why = "is not a file" if os.path.exists(pattern) else "is a link to what does not exist"
        return f"The table {pattern} {why}."
    verb = "finds no file" if glob.has_magic(pattern) else "does not exist"
    return f"The table {pattern} {verb} (seen from {Path.cwd()})."


def _inside(folder: str) -> str:
    """How to name the tables in a folder."""
    suffixes = (".tar", ".parquet", ".jsonl", ".csv", ".tsv")
    try:
        found = {os.path.splitext(name)[1].lower() for name in os.listdir(folder)}
    except OSError:
        return ""
    kinds = [suffix for suffix in suffixes if suffix in found]
    return f"; for the tables in it write {os.path.join(folder, '*' + kinds[0])}" if kinds else ""


def _check_distinct(files: Sequence[Path]) -> None:
    """A row that is there twice would be trained on twice an epoch."""
    seen: dict[str, Path] = {}
    for file in files:
        real = os.path.realpath(file)
        if real in seen:
            same = "" if seen[real] == file else f" (it is {seen[real]})"
            raise ConfigError(
                f"The table {file} is named twice{same}: name it once; give a source a weight to see it more often."
            )
        seen[real] = file
