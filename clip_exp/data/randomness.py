"""Random numbers and permutations that are pure functions of a key, not of a generator's state.

A crop or a caption depends only on (seed, epoch, row), so images and order are the same on any worker and rank and
after a restart. Everything is integer arithmetic in Python, so the numbers are the same on every platform and with
every version of every library.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple, Protocol

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def mix64(value: int) -> int:
    """Return a 64-bit hash of a 64-bit integer.

    This is splitmix64's finalizer (Steele, Lea and Flood 2014; constants by Stafford).
    """
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def hash64(*values: int) -> int:
    """Return a 64-bit hash of a sequence of integers; it depends on their order."""
    state = len(values)
    for value in values:
        state = mix64((state + _GOLDEN + mix64(value & _MASK)) & _MASK)
    return state


class Draws:
    """Stream of random numbers (splitmix64), seeded by a key of integers."""

    def __init__(self, *key: int) -> None:
        self._state = hash64(*key)

    def _next(self) -> int:
        self._state = (self._state + _GOLDEN) & _MASK
        return mix64(self._state)

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """Return a number in [low, high)."""
        return low + (high - low) * (self._next() >> 11) * 2.0**-53

    def integer(self, n: int) -> int:
        """Return an integer in 0 .. n-1, with a bias below n / 2**64."""
        return (self._next() * n) >> 64


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global generators of Python, NumPy and torch's CPU generator in the block; their states are restored afterwards.

    For the code of users, who draw from these generators. Imports torch.
    """
    import numpy as np
    import torch

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    # Not `torch.manual_seed`, which would also seed the GPUs.
    torch.default_generator.manual_seed(seed & (2**63 - 1))
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


# The order of an epoch. Every rank and worker computes single entries of it, so no array of all rows is needed.

_ROUNDS = 8
_PERMUTATION, _FEISTEL_ROUND, _ROTATION, _BLOCKS, _WINDOW = 1, 2, 8, 9, 10


class Order(Protocol):
    """Permutation of 0 .. len-1."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> int: ...


class Blocks(NamedTuple):
    """Sizes of a block shuffle."""

    rows: int  # neighboring rows per block
    window: int  # blocks per window, in which rows are mixed


@lru_cache(maxsize=256)
def epoch_order(n: int, seed: int, epoch: int, blocks: Blocks | None = None) -> Order:
    """Return the order of an epoch: a block shuffle, or a full shuffle without `blocks` or for less than two windows."""
    if blocks is None or n < 2 * blocks.rows * blocks.window:
        return Permutation(n, seed, epoch)
    return BlockShuffle(n, seed, epoch, blocks)


class Permutation:
    """Random permutation of 0 .. n-1 in constant memory, keyed by (seed, epoch).

    A Feistel network over the smallest power of two that is at least n, iterated until the result is below n ("cycle
    walking", Black and Rogaway 2002). It is a bijection by construction and needs less than two evaluations on average.
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
            raise IndexError(f"index {i} is out of range for {self.n} rows")
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


class BlockShuffle:
    """Random permutation of 0 .. n-1 that visits one part of the table at a time, keyed by (seed, epoch).

    The table is divided into blocks of neighboring rows, the blocks are permuted, and the rows within each window of
    `window` permuted blocks are permuted. The start of the first block is drawn for each epoch, so that the borders of
    the blocks differ between epochs. The last window also gets the remaining blocks and the short block at the end. It
    has up to twice as many blocks as the others.

    Two rows of a batch from one window are in the same block with probability (rows - 1) / (rows * window - 1), instead
    of (rows - 1) / (n - 1). `benchmarks/shuffle.py` measures the effect on batches and on reads.
    """

    def __init__(self, n: int, seed: int, epoch: int, blocks: Blocks) -> None:
        self.n, self._rows = n, blocks.rows
        self._start = Draws(_ROTATION, seed, epoch).integer(n) if n else 0
        self._whole = n // blocks.rows  # number of blocks, without the short one
        self._order = Permutation(self._whole, hash64(_BLOCKS, seed), epoch)
        self._window_rows = blocks.rows * blocks.window
        self._windows = max(1, self._whole // blocks.window)
        self._key = hash64(_WINDOW, seed, epoch)

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> int:
        if not 0 <= i < self.n:
            raise IndexError(f"index {i} is out of range for {self.n} rows")
        window = min(i // self._window_rows, self._windows - 1)
        first = window * self._window_rows
        size = self._window_rows if window < self._windows - 1 else self.n - first
        block, place = divmod(first + epoch_order(size, self._key, window)[i - first], self._rows)
        moved = self._order[block] if block < self._whole else block
        return (moved * self._rows + place + self._start) % self.n
