"""The sources of the training stream: which tables `data.train` names, how each is read, and how often it is drawn. No torch."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from clip_exp.config.data_schema import DataConfig
from clip_exp.config.load import nearest
from clip_exp.data.rows import Rows, build_rows
from clip_exp.data.tables.open import open_configured
from clip_exp.data.tables.table import PairTable
from clip_exp.errors import ConfigError

READING = ("image_root", "image_key", "caption_key", "separator", "encoding", "filter")
KEYS = ("path", "weight", *READING)
INDEX = "index"  # folder of the tables' indexes below output_dir
SLOTS = 4096  # samples in which the sources have exactly their shares


@dataclass(frozen=True)
class SourceSpec:
    """One entry of `data.train`.

    Attributes:
        paths: files and patterns, read as one table.
        weight: how often it is drawn, relative to the others; None: as often as it has rows.
        reading: keys of `DataConfig` that are different for this source.
    """

    paths: tuple[str, ...]
    weight: float | None = None
    reading: dict[str, str | None] = field(default_factory=dict)

    def configured(self, config: DataConfig) -> DataConfig:
        """The configuration by which this source is read."""
        return replace(config, **self.reading)  # type: ignore[arg-type]


class OpenSource(NamedTuple):
    """A source that was opened."""

    spec: SourceSpec
    table: PairTable
    rows: Rows


def parse(value: Any, key: str = "data.train") -> list[SourceSpec]:
    """What `data.train` names: one source for a path or a list of paths, one for each entry of a list that has a mapping.

    Raises:
        ConfigError: an unknown key, a missing or mistyped value, a weight that is not above 0; all that were found, a line each.
    """
    if value is None or value == []:
        return []
    entries = value if isinstance(value, list | tuple) else [value]
    if all(isinstance(entry, str | Path) for entry in entries):
        return [SourceSpec(tuple(map(str, entries)))]
    problems = [
        problem
        for i, entry in enumerate(entries)
        for problem in _problems(entry, f"{key}[{i}]" if entries is value else key)
    ]
    if problems:
        raise ConfigError("\n".join(problems))
    specs = [_spec(entry) for entry in entries]
    if len({spec.weight is None for spec in specs}) > 1:
        raise ConfigError(
            f"{key}: give every source a weight, or none: without weights each is drawn as often as it has rows."
        )
    return specs


def open_sources(config: DataConfig, index_dir: Path | None = None) -> list[OpenSource]:
    """The tables of `data.train`. `data.max_rows` limits each of them.

    Args:
        index_dir: see `open_table`.
    Raises:
        ConfigError: `data.train` makes no sense or names no file; a source is too rare to be drawn.
        DataError: see `open_table`.
    """
    opened = []
    for spec in parse(config.train):
        table = open_configured(
            spec.configured(config), list(spec.paths), max_rows=config.max_rows, index_dir=index_dir
        )
        opened.append(OpenSource(spec, table, build_rows(table, config.captions)))
    if len(opened) > 1:
        quotas(opened)
    return opened


def quotas(sources: Sequence[OpenSource]) -> list[int]:
    """How many of `SLOTS` samples each source gives: the shares of the weights, rounded by largest remainder.

    Raises: ConfigError for a source that would give none.
    """
    weights = [len(source.rows) if source.spec.weight is None else source.spec.weight for source in sources]
    largest = max(weights)
    shares = [weight / largest for weight in weights]
    exact = [SLOTS * share / math.fsum(shares) for share in shares]
    given = [int(share) for share in exact]
    by_remainder = sorted(range(len(given)), key=lambda i: (given[i] - exact[i], i))
    for i in by_remainder[: SLOTS - sum(given)]:
        given[i] += 1
    for source, quota in zip(sources, given, strict=True):
        if not quota:
            rare = f"weight={source.spec.weight:g}" if source.spec.weight is not None else f"{len(source.rows):,} rows"
            raise ConfigError(
                f"data.train: {source.spec.paths[0]} would never be drawn: its share ({rare}) is less than one sample in "
                f"{SLOTS:,}. Give it more weight, or leave it out."
            )
    return given


def _problems(entry: Any, where: str) -> Iterator[str]:
    if isinstance(entry, str | Path):
        return
    if not isinstance(entry, dict):
        yield f"{where}={entry} must be a path, or a mapping with a path and a weight."
        return
    for key in entry:
        if key not in KEYS:
            yield f"{where}.{key} does not exist: {nearest(str(key), KEYS)}"
    paths = entry.get("path")
    if not paths or not all(isinstance(path, str | Path) for path in (paths if isinstance(paths, list) else [paths])):
        yield f"{where}.path={paths} must be a file, or a list of files that are read as one table."
    weight = entry.get("weight")
    number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if weight is not None and not (number and 0 < weight < math.inf):
        yield f"{where}.weight={weight} must be a number above 0."
    for key in READING:
        value = entry.get(key, "")
        may_be_null = key in ("image_root", "filter")
        if not isinstance(value, str) and not (value is None and may_be_null):
            yield f"{where}.{key}={value} must be a text."


def _spec(entry: Any) -> SourceSpec:
    if isinstance(entry, str | Path):
        return SourceSpec((str(entry),))
    paths = entry["path"] if isinstance(entry["path"], list) else [entry["path"]]
    return SourceSpec(tuple(map(str, paths)), entry.get("weight"), {key: entry[key] for key in READING if key in entry})
