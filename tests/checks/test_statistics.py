"""Statistics compared with manual counts or with simulation."""

import math
from itertools import combinations

import numpy as np
import pytest

from clip_exp.checks.duplicates import equal_groups, find_leakage, number_contents
from clip_exp.checks.scan import choose
from clip_exp.checks.statistics import (
    LATIN,
    SCRIPTS,
    english_tokens_per_character,
    equal_pairs_in_batch,
    linear_histogram,
    octave_histogram,
    quantiles,
    script_of,
)
from clip_exp.config.data import Captions
from clip_exp.text.tokenizer import Tokenizer


@pytest.mark.parametrize("drawn", Captions)
def test_expected_equal_captions_are_the_mean_of_many_batches(drawn: Captions) -> None:
    rng = np.random.default_rng(0)
    images = np.sort(rng.integers(0, 30, 90))
    images = np.unique(images, return_inverse=True)[1]
    captions = rng.integers(0, 12, 90)
    rows_of = [np.flatnonzero(images == image) for image in range(images.max() + 1)]
    found = []
    for _ in range(4000):
        rows = np.array([rng.choice(of_image) for of_image in rows_of]) if drawn is Captions.random else np.arange(90)
        batch = captions[rng.choice(rows, 10, replace=False)]
        found.append(sum(a == b for a, b in combinations(batch.tolist(), 2)))
    expected = equal_pairs_in_batch(captions, images, 10, drawn)
    assert expected == pytest.approx(np.mean(found), abs=4 * np.std(found) / math.sqrt(len(found)))


def test_distinct_captions_never_meet_their_like() -> None:
    numbers = np.arange(100)
    assert equal_pairs_in_batch(numbers, numbers, 64, Captions.random) == 0


def test_quantiles_are_values_of_the_data() -> None:
    found = quantiles(np.array([1, 2, 3, 1000]))
    assert found is not None
    assert (found["min"], found["p50"], found["max"], found["mean"]) == (1, 2, 1000, 251.5)
    assert quantiles(np.empty(0)) is None


def test_a_value_on_an_edge_begins_its_step() -> None:
    histogram = octave_histogram(np.array([64, 64, 127, 128]))
    assert histogram["edges"][0] == pytest.approx(64)
    assert histogram["counts"] == [2, 0, 0, 1, 1]


def test_what_is_above_the_end_is_in_the_last_step() -> None:
    histogram = linear_histogram(np.array([0, 3, 77, 78, 5000]), 78)
    assert (histogram["counts"][77], histogram["counts"][78]) == (1, 2)
    assert histogram["edges"][-2:] == [78, 5001]


def test_long_contexts_have_wider_steps_that_end_at_the_context() -> None:
    histogram = linear_histogram(np.array([0, 511, 512, 513]), 513)
    assert sum(histogram["counts"]) == 4
    assert len(histogram["counts"]) <= 102


def test_equal_groups_are_found_largest_first() -> None:
    assert [group.tolist() for group in equal_groups(np.array([5, 1, 5, 2, 1, 5, 9]))] == [[0, 2, 5], [1, 4]]
    assert equal_groups(np.empty(0, np.int64)) == []


def test_images_that_were_not_read_are_like_no_other() -> None:
    digests = [np.array([[1, 1], [1, 2]], "u8"), np.array([[1, 2]], "u8")]
    train, val = number_contents(digests, [np.array([0, 2]), np.array([1])], [3, 2])
    assert train[2] == val[1]
    assert len({*train.tolist(), *val.tolist()}) == 4


def test_leaks_are_reported_once_for_each_image() -> None:
    leakage = find_leakage(
        (np.array([7, 8, 8]), np.array([8, 1, 2])),
        (np.array([10, 11, 12], "u8"), np.array([20, 12, 21], "u8")),
        (np.array([70, 80, 81]), np.array([81, 90, 91])),
    )
    assert leakage.same_bytes == [(0, 1)]
    assert leakage.same_path == [(1, 2)]
    assert (leakage.images, leakage.fraction, leakage.pairs.tolist()) == (2, pytest.approx(2 / 3), [0])


@pytest.mark.parametrize(
    ("caption", "script"),
    [
        ("a dog", "Latin"),
        ("ein Mädchen", "Latin"),
        ("一只狗", "Han"),
        ("犬がボールをくわえて浜辺を走っている", "Hiragana"),
        ("собака on the beach бежит по пляжу", "Cyrillic"),
        ("🐶 2024!", "no letters"),
        ("", "no letters"),
        ("ꦲꦏ꧀ꦱꦫ", "other"),
    ],
)
def test_a_caption_is_in_the_script_of_most_of_its_letters(caption: str, script: str) -> None:
    assert SCRIPTS[script_of(caption)] == script


def test_english_costs_a_quarter_of_a_token_per_character() -> None:
    assert english_tokens_per_character(Tokenizer(1 << 20), 2) == pytest.approx(0.227, abs=0.001)
    assert script_of("English") == LATIN


def test_a_sample_is_random_sorted_and_the_same_each_time() -> None:
    chosen = choose(1000, 50)
    assert len(np.unique(chosen)) == 50
    assert (np.diff(chosen) > 0).all()
    assert 300 < chosen.mean() < 700
    np.testing.assert_array_equal(chosen, choose(1000, 50))
    np.testing.assert_array_equal(choose(7, 50), np.arange(7))
