"""The stream of a run: which source and which of its rows each sample is, for one source or several that are mixed."""

import os
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import accumulate
from typing import NamedTuple

from clip_exp.config.data_schema import DataConfig, Shuffle
from clip_exp.data.names import normal_path
from clip_exp.data.order import Blocks, epoch_order
from clip_exp.data.randomness import hash64
from clip_exp.data.rows import Rows
from clip_exp.data.sources import SLOTS, OpenSource, quotas
from clip_exp.data.tables.table import PairTable

_SOURCE, _SLOTS = 11, 12


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
