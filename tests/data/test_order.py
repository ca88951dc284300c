from collections import Counter
from itertools import chain, islice, pairwise

import pytest

from clip_exp.data.order import Permutation, StreamSampler
from clip_exp.data.randomness import Draws, hash64


@pytest.mark.parametrize("n", [*range(1, 70), 127, 128, 129, 1000, 1437, 4097])
def test_every_row_comes_once_per_epoch(n):
    permutation = Permutation(n, seed=3, epoch=5)
    assert sorted(permutation[i] for i in range(n)) == list(range(n))


def test_order_is_fixed_for_good():
    """A change would make every resumed run see other rows."""
    permutation = Permutation(1000, seed=0, epoch=0)
    assert [permutation[i] for i in range(8)] == [63, 19, 598, 95, 316, 743, 486, 638]


def test_epochs_and_seeds_have_different_orders():
    orders = {tuple(Permutation(50, seed, epoch)[i] for i in range(50)) for seed in range(10) for epoch in range(10)}
    assert len(orders) == 100


@pytest.mark.parametrize("n", [5, 10, 37])
def test_every_row_is_as_likely_at_every_place(n):
    epochs = 60 * n
    counts = Counter((i, p[i]) for p in (Permutation(n, 11, epoch) for epoch in range(epochs)) for i in range(n))
    expected = epochs / n
    chi_square = sum((counts[i, row] - expected) ** 2 / expected for i in range(n) for row in range(n))
    freedom = (n - 1) ** 2
    assert abs(chi_square - freedom) < 4 * (2 * freedom) ** 0.5


def test_neighbors_in_the_table_are_not_neighbors_in_the_stream():
    n = 5000
    order = [Permutation(n, 0, 0)[i] for i in range(n)]
    steps = Counter((after - before) % n for before, after in pairwise(order))
    assert max(steps.values()) < 12
    halves = sum(row < n // 2 for row in order[: n // 2])
    assert abs(halves - n / 4) < 4 * (n / 16) ** 0.5 * 2


def test_a_billion_rows_take_no_memory():
    permutation = Permutation(10**9, 0, 0)
    assert len({permutation[i] for i in range(1000)}) == 1000
    with pytest.raises(IndexError):
        permutation[10**9]


def test_ranks_slice_the_same_global_batches():
    whole = list(StreamSampler(12, total_samples=48))
    assert [k for batch in whole for k in batch] == list(range(48))
    for world_size in (2, 3, 4):
        ranks = [list(StreamSampler(12, rank, world_size, total_samples=48)) for rank in range(world_size)]
        assert [list(chain(*parts)) for parts in zip(*ranks, strict=True)] == whole


def test_a_restart_goes_on_where_the_stream_was_left():
    whole = list(StreamSampler(8, total_samples=80))
    for step in range(11):
        assert list(StreamSampler(8, start_sample=8 * step, total_samples=80)) == whole[step:]


def test_without_a_total_the_stream_is_endless_and_has_no_length():
    sampler = StreamSampler(4)
    assert len(list(islice(sampler, 1000))) == 1000
    with pytest.raises(TypeError):
        len(sampler)
    with pytest.raises(ValueError):
        StreamSampler(4, 0, 3)


def test_draws_depend_on_the_key_alone_and_are_uniform():
    assert Draws(1, 2).uniform() == Draws(1, 2).uniform() != Draws(2, 1).uniform()
    assert hash64(1) != hash64(1, 0) != hash64(0, 1)
    draws = Draws(0)
    numbers = [draws.uniform(2, 4) for _ in range(4000)]
    assert min(numbers) >= 2
    assert max(numbers) < 4
    assert abs(sum(numbers) / 4000 - 3) < 0.04
    assert Counter(draws.integer(4) for _ in range(4000)).keys() == {0, 1, 2, 3}
