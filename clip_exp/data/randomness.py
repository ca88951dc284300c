"""Random numbers that are a function of what they are for, never of what was drawn before.

A crop or a caption depends on (seed, epoch, row) alone, so pictures and order are the same whatever the worker, rank or
restart. Plain integers: the same on every platform and in every version of every library.
"""

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def mix64(value: int) -> int:
    """A 64-bit hash of a 64-bit integer: splitmix64's finalizer (Steele, Lea and Flood 2014; constants by Stafford)."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def hash64(*values: int) -> int:
    """A 64-bit hash of a sequence of integers; their order counts."""
    state = len(values)
    for value in values:
        state = mix64((state + _GOLDEN + mix64(value & _MASK)) & _MASK)
    return state


class Draws:
    """A stream of random numbers (splitmix64) that starts from a key of integers."""

    def __init__(self, *key: int) -> None:
        self._state = hash64(*key)

    def _next(self) -> int:
        self._state = (self._state + _GOLDEN) & _MASK
        return mix64(self._state)

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """A number in [low, high)."""
        return low + (high - low) * (self._next() >> 11) * 2.0**-53

    def integer(self, n: int) -> int:
        """A number in 0 .. n-1, with a bias below n / 2**64."""
        return (self._next() * n) >> 64
