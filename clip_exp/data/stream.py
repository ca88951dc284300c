"""Training data as an infinite stream of samples, where the sample at any position can be computed directly.

`data.train` names one or more sources. Each source is a table whose rows are images with one of their captions, or
image-text pairs.

    stream = Stream(open_sources(config), config, seed)
    source, epoch, row = stream[position]

Sample k of a source with N rows belongs to epoch k // N and is row `epoch_order(N, seed, epoch)[k % N]`. With several
sources, each position is first assigned to a source by the weights. With a global batch of G, step s uses the samples
`[s * G, (s + 1) * G)` for any number of ranks. The position in the data is therefore one number, the number of samples
seen, and resuming needs no other state.

This module does not import torch, so that commands can check the data of a run before they load it.
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
from clip_exp.data.tables.features import describe
from clip_exp.data.tables.open import open_configured
from clip_exp.data.tables.table import PairTable
from clip_exp.errors import ConfigError, DataError

INDEX = "index"  # folder of the table indexes in output_dir
SLOTS = 4096  # samples per round; within a round, each source has exactly its fraction of the samples
# First integer of a random key, so that different uses of one seed are independent.
_CAPTION, _SOURCE, _SLOTS = 3, 11, 12


# Rows of a source.


class Rows:
    """Rows of one source, 0 .. len-1, as `data.captions` defines them.

    With `all`, every image-text pair of the table is a row. With `random`, every distinct image is a row, and one of
    its captions is drawn in each epoch.
    """

    def __init__(self, table: PairTable, captions: Captions) -> None:
        # Keep the table, not its arrays: an indexed table is memory-mapped and pickles as its folder, so all workers
        # share one copy.
        self._table = table
        self._captions = captions
        self.images = table.images  # number of distinct images

    def __len__(self) -> int:
        return self.images if self._captions is Captions.random else len(self._table)

    def table_row(self, row: int, seed: int, epoch: int) -> int:
        """Return the row of the table that holds the image and the caption of `row` in an epoch."""
        if self._captions is not Captions.random:
            return row
        rows = self._table.rows_of(row)
        return int(rows[hash64(_CAPTION, seed, epoch, row) % len(rows)])


# Sources: the tables of a run, and how often each is drawn.


class OpenSource(NamedTuple):
    """An entry of `data.train` with its opened table."""

    spec: Source
    table: PairTable
    rows: Rows


def configured(source: Source, config: DataConfig) -> DataConfig:
    """Return the data configuration with the keys that the source overrides."""
    return config.model_copy(update=source.reading)


def open_sources(config: DataConfig, index_dir: Path | None = None) -> list[OpenSource]:
    """Open the tables of `data.train`. `data.max_rows` applies to each of them.

    Args:
        index_dir: see `open_table`.
    Raises:
        ConfigError: `data.train` matches no file, or the weight of a source is so low that it would never be drawn.
        DataError: see `open_table`. Also raised if a column of `data.columns` has other values than in the first source.
    """
    opened: list[OpenSource] = []
    for spec in config.sources:
        table = open_configured(
            configured(spec, config), spec.paths, columns=config.columns, max_rows=config.max_rows, index_dir=index_dir
        )
        opened.append(OpenSource(spec, table, Rows(table, config.captions)))
        _check_shapes(opened[0].table, table)
    if len(opened) > 1:
        quotas(opened)
    return opened


def _check_shapes(first: PairTable, table: PairTable) -> None:
    for name, shape in table.shapes.items():
        if shape != first.shapes[name]:
            raise DataError(
                f"data.train: {name!r} (data.columns) has {describe(shape)} in {table.parts[0].path}, but "
                f"{describe(first.shapes[name])} in {first.parts[0].path}: write values of one kind and shape to all sources."
            )


class Tables(NamedTuple):
    """Opened tables of a run."""

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
    """Return the number of samples per `SLOTS` of each source, by the weights and rounded by largest remainder.

    Raises: ConfigError for a source whose number is 0.
    """
    weights = [len(source.rows) if source.spec.weight is None else source.spec.weight for source in sources]
    # Scale before summing: weights near the largest float would overflow.
    largest = max(weights)
    scaled = [weight / largest for weight in weights]
    exact = [SLOTS * weight / math.fsum(scaled) for weight in scaled]
    rounded = [int(samples) for samples in exact]
    by_remainder = sorted(range(len(rounded)), key=lambda i: (rounded[i] - exact[i], i))
    for i in by_remainder[: SLOTS - sum(rounded)]:
        rounded[i] += 1
    for source, quota in zip(sources, rounded, strict=True):
        if not quota:
            weight = (
                f"weight={source.spec.weight:g}" if source.spec.weight is not None else f"{len(source.rows):,} rows"
            )
            raise ConfigError(
                f"data.train: {source.spec.paths[0]} would never be drawn: its fraction of the samples ({weight}) is less than one in "
                f"{SLOTS:,}. Increase its weight, or remove it."
            )
    return rounded


# The stream: samples of all sources by position.


@dataclass(frozen=True)
class StreamSource:
    """Samples of one source, in the source's own order."""

    table: PairTable  # image-text pairs
    rows: Rows  # rows of the stream
    seed: int  # seed of the order, the captions, the crops and the replacements
    blocks: Blocks | None  # sizes for a block shuffle; None: full shuffle
    full_paths: bool  # True if only the full path identifies an image
    folder: str  # common parent folder of all sources, with a trailing slash; it may differ between nodes

    def at(self, position: int) -> tuple[int, int]:
        """Return the epoch and the row of a sample of this source."""
        # One entry of the permutation is computed at a time: as an array, 400 million rows would take 3 GB in each
        # worker.
        epoch, i = divmod(position, len(self.rows))
        return epoch, epoch_order(len(self.rows), self.seed, epoch, self.blocks)[i]

    def image_id(self, table_row: int) -> int:
        """Return an int64 that is equal for rows with the same image, across all sources of the stream."""
        if not self.full_paths:
            return self.table.image(table_row)
        # Ranks compare these numbers, so they must not depend on the folder in which a node stores the data.
        name = normal_path(self.table.image_path(table_row)).removeprefix(self.folder)
        digest = blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest()
        return int.from_bytes(digest, "little", signed=True)

    def image_name(self, table_row: int) -> str:
        """Return the name of an image for the list of bad images: its path in the table, or the full path if ambiguous."""
        first = int(self.table.rows_of(self.table.image(table_row))[0])
        return self.table.image_path(first) if self.full_paths else self.table.path(first)


class StreamSample(NamedTuple):
    """Source, epoch and row of one position of the stream."""

    source: StreamSource
    epoch: int  # epoch of the source, not of the run
    row: int


class Stream:
    """Infinite sequence of training samples, indexed by position.

    Several sources are mixed in rounds of `SLOTS` samples. Each round has exactly the same number of samples of each
    source, in an order that is drawn for the round. Each source passes through its own epochs, independently of the
    length of the others.

    Args:
        sources: opened sources.
        config: data configuration, for the shuffle.
        seed: seed of the order, the captions, the crops and the replacements.
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
                # Sources of equal length must not share a permutation.
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
        """Return the number of samples per epoch: the rows of all sources, regardless of their weights."""
        return sum(len(source.rows) for source in self.sources)

    def __getitem__(self, position: int) -> StreamSample:
        if len(self.sources) == 1:
            return StreamSample(self.sources[0], *self.sources[0].at(position))
        # Why not draw the source of each sample independently? Then the position within the source would be known only
        # by counting all samples before it. With a fixed number per round it follows from the global position, so
        # resuming needs no other state.
        round_, slot = divmod(position, SLOTS)
        # A permutation of the slots of this round; slots [end - quota, end) belong to source i.
        drawn = epoch_order(SLOTS, self._key, round_)[slot]
        i = bisect_right(self._ends, drawn)
        position_in_source = round_ * self._quotas[i] + drawn - (self._ends[i] - self._quotas[i])
        return StreamSample(self.sources[i], *self.sources[i].at(position_in_source))


def blocks_of(config: DataConfig, table: PairTable) -> Blocks | None:
    """Return the sizes for a block shuffle of a table, or None for a full shuffle.

    The default is by blocks for shards only.
    """
    # A full shuffle jumps to another shard with every sample, which is slow on disks and network file systems.
    shuffle = config.shuffle or (Shuffle.full if table.members is None else Shuffle.block)
    return Blocks(config.shuffle_block, config.shuffle_window) if shuffle is Shuffle.block else None


def needs_full_paths(table: PairTable) -> bool:
    """Return True if equal paths in a table may be different images, because it spans several folders or shards."""
    return table.members is not None or len({part.root for part in table.parts}) > 1
