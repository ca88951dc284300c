"""The stream of a run: which source and which of its rows each sample is, for one source or several that are mixed. No torch.

`data.train` names sources, each a table; a row of a source is a picture with one of its captions, or a pair of the table. The order
is an endless stream that every rank and worker can compute from a position: sample k of a source of N rows belongs to epoch k // N
and is row `epoch_order(N, seed, epoch)[k % N]`. The global batch of step s is samples [s * G, (s + 1) * G), whatever the number of
ranks, so the only state of training's data is how many were seen.
"""

import math
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from clip_exp.config.data_schema import Captions, DataConfig, Shuffle
from clip_exp.config.load import nearest
from clip_exp.data.files import normal_path
from clip_exp.data.randomness import Blocks, epoch_order, hash64
from clip_exp.data.tables.open import open_configured
from clip_exp.data.tables.table import PairTable
from clip_exp.errors import ConfigError

READING = ("image_root", "image_key", "caption_key", "separator", "encoding", "filter")
KEYS = ("path", "weight", *READING)
INDEX = "index"  # folder of the tables' indexes below output_dir
SLOTS = 4096  # samples in which the sources have exactly their shares
_CAPTION, _SOURCE, _SLOTS = 3, 11, 12  # what is drawn


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


# Rows: what a sample of a source is, a picture with one of its captions or a pair of the table.


class Rows(Protocol):
    """The rows of the stream, 0 .. len-1."""

    pictures: int  # distinct pictures among them

    def __len__(self) -> int: ...

    def table_row(self, row: int, seed: int, epoch: int) -> int:
        """The table's row that gives picture and caption."""
        ...


def build_rows(table: PairTable, captions: Captions) -> Rows:
    """The rows of the stream for `data.captions`."""
    return PictureRows(table) if captions is Captions.random else PairRows(table)


class PairRows:
    """Every pair of the table is a row."""

    def __init__(self, table: PairTable) -> None:
        self._table = table
        self.pictures = table.pictures

    def __len__(self) -> int:
        return len(self._table)

    def table_row(self, row: int, seed: int, epoch: int) -> int:
        return row


class PictureRows:
    """Every distinct picture is a row; which of its captions it comes with is drawn anew in each epoch."""

    def __init__(self, table: PairTable) -> None:
        self._table = table  # not its arrays: a table in an index is pickled as the folder's name
        self.pictures = table.pictures

    def __len__(self) -> int:
        return self.pictures

    def table_row(self, row: int, seed: int, epoch: int) -> int:
        rows = self._table.rows_of(row)
        return int(rows[hash64(_CAPTION, seed, epoch, row) % len(rows)])


# Sources: which tables there are, and how often each is drawn.


class OpenSource(NamedTuple):
    """A source that was opened."""

    spec: SourceSpec
    table: PairTable
    rows: Rows


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


# The stream: the samples of all sources, by position.


@dataclass(frozen=True)
class StreamSource:
    """The samples of one source, in an order of its own.

    Attributes:
        table: of pairs.
        rows: of the stream.
        seed: of order, captions, crops and replacements.
        blocks: of its block shuffle; None: a full one.
        full_paths: whether its pictures need their whole path to be told from others.
        folder: that holds all sources, with a slash at its end; nodes may have it in different places.
    """

    table: PairTable
    rows: Rows
    seed: int
    blocks: Blocks | None
    full_paths: bool
    folder: str

    def at(self, position: int) -> tuple[int, int]:
        """Epoch and row of a sample of this source."""
        epoch, i = divmod(position, len(self.rows))
        return epoch, epoch_order(len(self.rows), self.seed, epoch, self.blocks)[i]

    def image_id(self, table_row: int) -> int:
        """Return an int64 that is equal for rows that show the same image, in all sources of the stream."""
        if not self.full_paths:
            return self.table.picture(table_row)
        name = normal_path(self.table.image_path(table_row)).removeprefix(self.folder)
        digest = blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest()
        return int.from_bytes(digest, "little", signed=True)

    def picture_name(self, table_row: int) -> str:
        """What a bad picture is listed as: its path as its first row has it, the whole one where that names several."""
        first = int(self.table.rows_of(self.table.picture(table_row))[0])
        return self.table.image_path(first) if self.full_paths else self.table.path(first)


class StreamSample(NamedTuple):
    """What a position of the stream is."""

    source: StreamSource
    epoch: int  # of the source
    row: int


class Stream:
    """Samples by position, without end.

    Several sources share every `SLOTS` samples by their weights, exactly; which of those is whose is drawn anew for each. Every
    source goes through its own rows, epoch after epoch, however long the others take.

    Args:
        sources: that were opened.
        config: of the shuffle.
        seed: of everything that is drawn.
    """

    def __init__(self, sources: Sequence[OpenSource], config: DataConfig, seed: int) -> None:
        several = len(sources) > 1
        folders = [normal_path(str(folder)) for source in sources for folder in source.table.folders]
        folder = os.path.join(os.path.commonpath(folders), "")
        self.pictures = sum(source.rows.pictures for source in sources)
        self.sources = [
            StreamSource(
                source.table,
                source.rows,
                hash64(_SOURCE, seed, i) if several else seed,
                blocks_of(config, source.table),
                several or needs_full_paths(source.table),
                folder,
            )
            for i, source in enumerate(sources)
        ]
        self._key = hash64(_SLOTS, seed)
        self._quotas = quotas(sources)
        self._ends = list(accumulate(self._quotas))

    def __len__(self) -> int:
        """Samples of an epoch: the rows of all sources, whatever their weights."""
        return sum(len(source.rows) for source in self.sources)

    def __getitem__(self, position: int) -> StreamSample:
        i, own = self._locate(position) if len(self.sources) > 1 else (0, position)
        return StreamSample(self.sources[i], *self.sources[i].at(own))

    def _locate(self, position: int) -> tuple[int, int]:
        """Which source a sample comes from, and its position among that source's."""
        round_, slot = divmod(position, SLOTS)
        drawn = epoch_order(SLOTS, self._key, round_)[slot]
        i = bisect_right(self._ends, drawn)
        return i, round_ * self._quotas[i] + drawn - (self._ends[i] - self._quotas[i])


def blocks_of(config: DataConfig, table: PairTable) -> Blocks | None:
    """How a table is shuffled: by blocks where the configuration says so, or leaves it open and the table is of shards."""
    shuffle = config.shuffle or (Shuffle.full if table.members is None else Shuffle.block)
    return Blocks(config.shuffle_block, config.shuffle_window) if shuffle is Shuffle.block else None


def needs_full_paths(table: PairTable) -> bool:
    """Whether equal paths of a table may be different pictures: in several folders or shards."""
    return table.members is not None or len({part.root for part in table.parts}) > 1
