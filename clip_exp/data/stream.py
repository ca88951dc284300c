"""The stream of a run: which source and which of its rows each sample is, for one source or several that are mixed. No torch.

`data.train` names sources, each a table; a row of a source is an image with one of its captions, or a pair of the table. The order
is an endless stream that every rank and worker can compute from a position: sample k of a source of N rows belongs to epoch k // N
and is row `epoch_order(N, seed, epoch)[k % N]`. The global batch of step s is samples [s * G, (s + 1) * G), whatever the number of
ranks, so the only state of training's data is how many were seen.
"""

import math
import os
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from clip_exp.config.data import Captions, DataConfig, Shuffle, Source
from clip_exp.data.files import normal_path
from clip_exp.data.randomness import Blocks, epoch_order, hash64
from clip_exp.data.tables.open import open_configured
from clip_exp.data.tables.table import PairTable
from clip_exp.errors import ConfigError

INDEX = "index"  # folder of the tables' indexes below output_dir
SLOTS = 4096  # samples in which the sources have exactly their shares
_CAPTION, _SOURCE, _SLOTS = 3, 11, 12  # what is drawn


# Rows: what a sample of a source is.


class Rows:
    """The rows of the stream, 0 .. len-1, as `data.captions` has them.

    Every pair of the table is a row; or every distinct image, and which of its captions it comes with is drawn anew in each epoch.
    """

    def __init__(self, table: PairTable, captions: Captions) -> None:
        # Not its arrays: a table in an index is mapped into memory and pickles as its folder's name, so that workers share one copy.
        self._table = table
        self._captions = captions
        self.images = table.images  # distinct ones

    def __len__(self) -> int:
        return self.images if self._captions is Captions.random else len(self._table)

    def table_row(self, row: int, seed: int, epoch: int) -> int:
        """The table's row that gives image and caption."""
        if self._captions is not Captions.random:
            return row
        rows = self._table.rows_of(row)
        return int(rows[hash64(_CAPTION, seed, epoch, row) % len(rows)])


# Sources: which tables there are, and how often each is drawn.


class OpenSource(NamedTuple):
    """A source that was opened."""

    spec: Source
    table: PairTable
    rows: Rows


def configured(source: Source, config: DataConfig) -> DataConfig:
    """Return the configuration by which a source is read."""
    return config.model_copy(update=source.reading)


def open_sources(config: DataConfig, index_dir: Path | None = None) -> list[OpenSource]:
    """The tables of `data.train`. `data.max_rows` limits each of them.

    Args:
        index_dir: see `open_table`.
    Raises:
        ConfigError: `data.train` names no file; a source is too rare to be drawn.
        DataError: see `open_table`.
    """
    opened = []
    for spec in config.sources:
        table = open_configured(configured(spec, config), spec.paths, max_rows=config.max_rows, index_dir=index_dir)
        opened.append(OpenSource(spec, table, Rows(table, config.captions)))
    if len(opened) > 1:
        quotas(opened)
    return opened


class Tables(NamedTuple):
    """The opened tables of a run."""

    sources: list[OpenSource]
    val: PairTable | None


def open_tables(config: DataConfig, index_dir: Path | None = None) -> Tables:
    """Open the tables of `data.train` and `data.val`.

    Args:
        index_dir: see `open_table`.
    Raises:
        ConfigError, DataError: see `open_sources`.
    """
    sources, val = open_sources(config, index_dir), None
    if config.val is not None:
        val = open_configured(config, config.val, label_key=config.label_key, index_dir=index_dir)
    return Tables(sources, val)


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
    """The samples of one source, in an order of its own."""

    table: PairTable  # of pairs
    rows: Rows  # of the stream
    seed: int  # of order, captions, crops and replacements
    blocks: Blocks | None  # of its block shuffle; None: a full one
    full_paths: bool  # whether its images need their whole path to be told from others
    folder: str  # that holds all sources, with a slash at its end; nodes may have it in different places

    def at(self, position: int) -> tuple[int, int]:
        """Epoch and row of a sample of this source."""
        # The order is computed entry by entry: as an array it would take 3 GB in each worker for 400 million rows.
        epoch, i = divmod(position, len(self.rows))
        return epoch, epoch_order(len(self.rows), self.seed, epoch, self.blocks)[i]

    def image_id(self, table_row: int) -> int:
        """Return an int64 that is equal for rows that show the same image, in all sources of the stream."""
        if not self.full_paths:
            return self.table.image(table_row)
        # Ranks compare these numbers, so they must not depend on where a node has the data.
        name = normal_path(self.table.image_path(table_row)).removeprefix(self.folder)
        digest = blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest()
        return int.from_bytes(digest, "little", signed=True)

    def image_name(self, table_row: int) -> str:
        """What a bad image is listed as: its path as its first row has it, the whole one where that names several."""
        first = int(self.table.rows_of(self.table.image(table_row))[0])
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
        self.images = sum(source.rows.images for source in sources)
        self.sources = [
            StreamSource(
                source.table,
                source.rows,
                hash64(_SOURCE, seed, i) if several else seed,  # sources of equal length are not to go in step
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
        if len(self.sources) == 1:
            return StreamSample(self.sources[0], *self.sources[0].at(position))
        # Were each sample's source drawn on its own, only counting all samples before it would give its place in the source.
        # With exact shares per round the place follows from the position, so a restart needs no other state.
        round_, slot = divmod(position, SLOTS)
        drawn = epoch_order(SLOTS, self._key, round_)[slot]
        i = bisect_right(self._ends, drawn)
        own = round_ * self._quotas[i] + drawn - (self._ends[i] - self._quotas[i])
        return StreamSample(self.sources[i], *self.sources[i].at(own))


def blocks_of(config: DataConfig, table: PairTable) -> Blocks | None:
    """How a table is shuffled: by blocks where the configuration says so, or leaves it open and the table is of shards."""
    # A full shuffle jumps between shards with every sample, which a disk or a network reads slowly.
    shuffle = config.shuffle or (Shuffle.full if table.members is None else Shuffle.block)
    return Blocks(config.shuffle_block, config.shuffle_window) if shuffle is Shuffle.block else None


def needs_full_paths(table: PairTable) -> bool:
    """Whether equal paths of a table may be different images: in several folders or shards."""
    return table.members is not None or len({part.root for part in table.parts}) > 1
