"""Training data as an infinite stream of samples, where the sample at any position can be computed directly.

`data.train` names one or more sources, and `data._target_` a single one. The rows of a source (`data.pairs.Rows`) are
images with one of their captions, or image-text pairs.

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
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from clip_exp.config.base import Target
from clip_exp.config.data import CustomDataConfig, DataConfig, Shuffle, Source
from clip_exp.data.custom import DatasetItems, DatasetRows, open_dataset
from clip_exp.data.files import ImageLimits, normal_path
from clip_exp.data.pairs import Items, JoinedItems, Pair, Rows, TableItems, TableRows, needs_full_paths
from clip_exp.data.randomness import Blocks, epoch_order, hash64
from clip_exp.data.tables.features import describe
from clip_exp.data.tables.open import open_configured
from clip_exp.data.tables.table import PairTable
from clip_exp.errors import ConfigError, DataError

INDEX = "index"  # folder of the table indexes in output_dir
SLOTS = 4096  # samples per round; within a round, each source has exactly its fraction of the samples
# First integer of a random key, so that different uses of one seed are independent.
_SOURCE, _SLOTS = 11, 12


# Sources: the tables of a run or the user's data set, and how often each is drawn.


class OpenSource(NamedTuple):
    """Opened source of the training stream."""

    rows: Rows
    weight: float | None = None  # None, for all sources: each is sampled in proportion to its rows
    filter: str | None = None  # condition for rows of a table


class Sources(NamedTuple):
    """Opened training sources and validation data of a run."""

    train: list[OpenSource]
    val: Items | None


def configured(source: Source, config: DataConfig) -> DataConfig:
    """Return the data configuration with the keys that the source overrides."""
    return config.model_copy(update=source.reading)


def open_all(config: DataConfig, index_dir: Path | None = None) -> Sources:
    """Open the sources of the training stream and the validation data.

    Args:
        index_dir: see `open_table`.
    Raises:
        ConfigError, DataError: see `open_sources` and `data.custom.open_dataset`.
    """
    return Sources(open_sources(config, index_dir), _open_val(config, index_dir))


def open_sources(config: DataConfig, index_dir: Path | None = None) -> list[OpenSource]:
    """Open the user's data set, or the tables of `data.train`. `data.max_rows` applies to each of them.

    Args:
        index_dir: see `open_table`.
    Raises:
        ConfigError: `data.train` matches no file, or the weight of a source is so low that it would never be drawn; see
            also `data.custom.open_dataset`.
        DataError: see `open_table`. Also raised if a column of `data.columns` has other values than in the first source.
    """
    if isinstance(config, CustomDataConfig):
        dataset = open_dataset(
            config, "data", max_items=config.max_rows, shared=config.shared, num_workers=config.num_workers
        )
        return [OpenSource(DatasetRows(dataset, config.captions, config.columns))]
    if not config.train:
        raise ConfigError("data.train has no value: set it to a table of image-text pairs, or set data.generate.")
    tables = open_train_tables(config, index_dir)
    shared = None
    if len(tables) > 1 or needs_full_paths(tables[0][1]):
        folders = [normal_path(str(folder)) for _, table in tables for folder in table.folders]
        shared = os.path.join(os.path.commonpath(folders), "")
    opened = [
        OpenSource(
            TableRows(table, config.captions, shared, configured(spec, config).caption_weights),
            spec.weight,
            configured(spec, config).filter,
        )
        for spec, table in tables
    ]
    if len(opened) > 1:
        quotas(opened)
    return opened


def open_train_tables(config: DataConfig, index_dir: Path | None = None) -> list[tuple[Source, PairTable]]:
    """Open the tables of `data.train`; see `open_sources`."""
    opened: list[tuple[Source, PairTable]] = []
    for spec in config.sources:
        table = open_configured(
            configured(spec, config), spec.paths, columns=config.columns, max_rows=config.max_rows, index_dir=index_dir
        )
        opened.append((spec, table))
        _check_shapes(opened[0][1], table)
    return opened


def _check_shapes(first: PairTable, table: PairTable) -> None:
    for name, shape in table.shapes.items():
        if shape != first.shapes[name]:
            raise DataError(
                f"data.train: {name!r} (data.columns) has {describe(shape)} in {table.parts[0].path}, but "
                f"{describe(first.shapes[name])} in {first.parts[0].path}: write values of one kind and shape to all sources."
            )


def open_val_tables(config: DataConfig, index_dir: Path | None = None) -> list[PairTable]:
    """Open the tables of `data.val`, or those of the images of `data.train` that `data.val_fraction` holds out; see `open_sources`."""
    held_out = config.val_fraction is not None
    return [
        open_configured(
            configured(spec, config),
            spec.paths,
            label_key=config.label_key,
            held_out=held_out,
            max_rows=config.max_rows if held_out else None,
            index_dir=index_dir,
        )
        for spec in (config.sources if held_out else config.val_sources)
    ]


def _open_val(config: DataConfig, index_dir: Path | None) -> Items | None:
    if isinstance(config.val, Target):
        return DatasetItems(open_dataset(config.val, "data.val", num_workers=config.num_workers))
    tables = open_val_tables(config, index_dir)
    if len(tables) > 1:
        return JoinedItems([TableItems(table) for table in tables])
    return TableItems(tables[0]) if tables else None


def quotas(sources: Sequence[OpenSource]) -> list[int]:
    """Return the number of samples per `SLOTS` of each source, by the weights and rounded by largest remainder.

    Raises: ConfigError for a source whose number is 0.
    """
    weights = [len(source.rows) if source.weight is None else source.weight for source in sources]
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
            weight = f"weight={source.weight:g}" if source.weight is not None else f"{len(source.rows):,} rows"
            raise ConfigError(
                f"data.train: {source.rows.origin.name} would never be drawn: its fraction of the samples ({weight}) is less than one in "
                f"{SLOTS:,}. Increase its weight, or remove it."
            )
    return rounded


# The stream: samples of all sources by position.


@dataclass(frozen=True)
class StreamSource:
    """Samples of one source, in the source's own order."""

    rows: Rows
    seed: int  # seed of the order, the captions, the crops and the replacements
    blocks: Blocks | None  # sizes for a block shuffle; None: full shuffle

    def at(self, position: int) -> tuple[int, int]:
        """Return the epoch and the row of a sample of this source."""
        # One entry of the permutation is computed at a time: as an array, 400 million rows would take 3 GB in each
        # worker.
        epoch, i = divmod(position, len(self.rows))
        return epoch, epoch_order(len(self.rows), self.seed, epoch, self.blocks)[i]

    def load(self, epoch: int, row: int, limits: ImageLimits) -> Pair:
        """Return the image of a row and its caption in an epoch; see `Rows.load`."""
        return self.rows.load(row, self.seed, epoch, limits)

    def caption(self, epoch: int, row: int) -> str | None:
        """Return the caption of a row in an epoch without its image; see `Rows.caption`."""
        return self.rows.caption(row, self.seed, epoch)


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
        self.images = sum(source.rows.images for source in sources)
        self.sources = [
            # Sources of equal length must not share a permutation.
            StreamSource(
                source.rows, hash64(_SOURCE, seed, i) if len(sources) > 1 else seed, blocks_of(config, source.rows)
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


def blocks_of(config: DataConfig, rows: Rows) -> Blocks | None:
    """Return the sizes for a block shuffle of a source, or None for a full shuffle.

    The default is by blocks for shards only.
    """
    # A full shuffle jumps to another shard with every sample, which is slow on disks and network file systems.
    shuffle = config.shuffle or (Shuffle.block if rows.in_shards else Shuffle.full)
    return Blocks(config.shuffle_block, config.shuffle_window) if shuffle is Shuffle.block else None
