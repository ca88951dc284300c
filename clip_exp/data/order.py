"""The order in which a run sees its rows: an endless stream that every rank and worker can compute from a position.

Sample k of the stream belongs to epoch k // N and is row `Permutation(N, seed, epoch)[k % N]`. The global batch of step s is
samples [s * G, (s + 1) * G), whatever the number of ranks, so the only state of training's data is how many were seen.
"""

from collections.abc import Iterator

from torch.utils.data import Sampler

from clip_exp.data.randomness import hash64, mix64

_ROUNDS = 8
_PERMUTATION, _FEISTEL_ROUND = 1, 2


class Permutation:
    """A random permutation of 0 .. n-1 in constant memory, keyed by (seed, epoch).

    A Feistel network over the smallest power of two that holds n, iterated until it lands below n ("cycle walking", Black and
    Rogaway 2002): a bijection by construction, less than two evaluations on average.
    """

    def __init__(self, n: int, seed: int, epoch: int) -> None:
        self.n = n
        bits = max(n - 1, 0).bit_length()
        self._right_bits = (bits + 1) // 2
        self._right_mask = (1 << self._right_bits) - 1
        self._left_mask = (1 << (bits - self._right_bits)) - 1
        key = hash64(_PERMUTATION, seed, epoch)
        self._keys = [
            (hash64(_FEISTEL_ROUND, key, r), hash64(_FEISTEL_ROUND, key, r + 1)) for r in range(0, _ROUNDS, 2)
        ]

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> int:
        if not 0 <= i < self.n:
            raise IndexError(f"{i} is not a row of {self.n}")
        value = self._encrypt(i)
        while value >= self.n:
            value = self._encrypt(value)
        return value

    def _encrypt(self, value: int) -> int:
        left, right = value >> self._right_bits, value & self._right_mask
        for left_key, right_key in self._keys:
            left ^= mix64(right ^ left_key) & self._left_mask
            right ^= mix64(left ^ right_key) & self._right_mask
        return (left << self._right_bits) | right


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
