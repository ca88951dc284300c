from collections import Counter
from itertools import chain, islice, pairwise

import pytest

from clip_exp.data.datamodule import StreamSampler
from clip_exp.data.randomness import Blocks, BlockShuffle, Draws, Permutation, epoch_order, hash64


@pytest.mark.parametrize("n", [*range(1, 70), 127, 128, 129, 1000, 1437, 4097])
def test_every_row_comes_once_per_epoch(n):
    permutation = Permutation(n, seed=3, epoch=5)
    assert sorted(permutation[i] for i in range(n)) == list(range(n))


def test_order_is_fixed_for_good():
    """With another order, every resumed run would see other rows."""
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


@pytest.mark.parametrize(
    "blocks", [Blocks(1, 1), Blocks(1, 7), Blocks(5, 1), Blocks(3, 4), Blocks(16, 2), Blocks(500, 3)]
)
@pytest.mark.parametrize("n", [1, 2, 7, 24, 25, 96, 97, 1000])
def test_every_row_comes_once_per_epoch_of_a_block_shuffle(n, blocks):
    for epoch in range(3):
        shuffle = BlockShuffle(n, 3, epoch, blocks)
        assert sorted(shuffle[i] for i in range(n)) == list(range(n))
    with pytest.raises(IndexError):
        shuffle[n]


def test_the_order_of_a_block_shuffle_is_fixed_for_good():
    shuffle = BlockShuffle(1000, 0, 0, Blocks(10, 4))
    assert [shuffle[i] for i in range(8)] == [100, 97, 305, 94, 98, 311, 629, 382]
    assert BlockShuffle(1000, 0, 1, Blocks(10, 4))[0] != shuffle[0] != BlockShuffle(1000, 1, 0, Blocks(10, 4))[0]


def test_a_window_of_a_block_shuffle_reads_its_blocks_alone():
    n, blocks = 10_007, Blocks(20, 10)
    shuffle = BlockShuffle(n, 0, 0, blocks)
    for start in range(0, 9_800, 200):
        rows = sorted(shuffle[i] for i in range(start, start + 200))
        runs = 1 + sum(after - before > 1 for before, after in pairwise(rows))
        assert runs <= 10 + 1  # a block may go round the table's end


def test_a_block_shuffle_has_other_borders_in_each_epoch():
    """Neighbors in the table are in one window in most epochs, and none of them in all."""
    n, epochs = 400, 80
    orders = (BlockShuffle(n, 0, epoch, Blocks(10, 2)) for epoch in range(epochs))
    windows = [{order[i]: i // 20 for i in range(n)} for order in orders]
    for row in range(100, 110):
        assert 0.8 * epochs < sum(window[row] == window[row + 1] for window in windows) < epochs


def test_every_row_is_as_likely_at_every_place_of_a_block_shuffle():
    n, epochs = 37, 3000
    orders = (BlockShuffle(n, 5, epoch, Blocks(3, 2)) for epoch in range(epochs))
    counts = Counter((i, order[i]) for order in orders for i in range(n))
    expected, freedom = epochs / n, (n - 1) ** 2
    chi_square = sum((counts[i, row] - expected) ** 2 / expected for i in range(n) for row in range(n))
    assert abs(chi_square - freedom) < 5 * (2 * freedom) ** 0.5


def test_rows_of_a_block_share_a_batch_as_often_as_the_docstring_says():
    n, blocks, batch = 64_000, Blocks(8, 16), 32
    shuffle = BlockShuffle(n, 0, 0, blocks)
    pairs = 0
    for first in range(0, n, batch):
        of_block = Counter((shuffle[i] - shuffle._start) % n // 8 for i in range(first, first + batch))
        pairs += sum(count * (count - 1) // 2 for count in of_block.values())
    expected = batch * (batch - 1) / 2 * 7 / 127
    assert pairs / (n / batch) == pytest.approx(expected, rel=0.03)


def test_few_rows_are_shuffled_fully():
    n, blocks = 63, Blocks(8, 4)
    assert [epoch_order(n, 1, 2, blocks)[i] for i in range(n)] == [Permutation(n, 1, 2)[i] for i in range(n)]
    assert isinstance(epoch_order(64, 1, 2, blocks), BlockShuffle)


def test_a_billion_rows_take_no_memory_in_blocks():
    shuffle = BlockShuffle(10**9, 0, 0, Blocks(256, 64))
    rows = [shuffle[i] for i in range(16_384)]
    assert len({*rows}) == 16_384
    assert len({row // 256 for row in rows}) <= 128


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
