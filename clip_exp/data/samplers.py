"""Which positions of the stream, or rows of the validation table, are in each batch of a rank."""

from collections.abc import Iterator

from torch.utils.data import Sampler


class StreamSampler(Sampler[list[int]]):
    """Positions of the stream in each of this rank's batches: a contiguous slice of every global batch.

    It has a length only where `total_samples` is given. Batches straddle epochs, so no row is ever dropped.

    Args:
        global_batch_size: samples per optimizer step over all ranks; a multiple of `world_size`.
        rank, world_size: of this process.
        start_sample: samples of the stream that were seen before.
        total_samples: where the stream ends, counted from its beginning; None: never.
    """

    def __init__(
        self,
        global_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        start_sample: int = 0,
        total_samples: int | None = None,
    ) -> None:
        if global_batch_size % world_size:
            raise ValueError(f"a global batch of {global_batch_size} cannot be shared by {world_size} ranks")
        self.global_batch_size = global_batch_size
        self.local_batch_size = global_batch_size // world_size
        self.rank = rank
        self.start_sample = start_sample
        self.total_samples = total_samples

    def __iter__(self) -> Iterator[list[int]]:
        step_start = self.start_sample
        while self.total_samples is None or step_start < self.total_samples:
            first = step_start + self.rank * self.local_batch_size
            yield list(range(first, first + self.local_batch_size))
            step_start += self.global_batch_size


class EvalSampler(Sampler[list[int]]):
    """Indices of this rank's validation batches: as many on every rank, the last ones wrapped round where they do not come out.

    Whoever reads the results drops the repeated indices.
    """

    def __init__(self, count: int, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        self.count, self.batch_size, self.rank, self.world_size = count, batch_size, rank, world_size
        self._per_rank = -(-count // world_size)

    def __len__(self) -> int:
        return -(-self._per_rank // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(0, self._per_rank, self.batch_size):
            steps = range(start, min(start + self.batch_size, self._per_rank))
            yield [(step * self.world_size + self.rank) % self.count for step in steps]
