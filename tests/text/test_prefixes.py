"""Tests of prefix trees: the features equal those of each text padded to the full context."""

import random

import pytest
import torch

from clip_exp.evaluation.features import encode_texts
from clip_exp.models.clip import CLIP
from clip_exp.text.prefixes import NODES, TokenTrees, TreeLayout, grow, pack
from clip_exp.text.tokenizer import Tokenizer
from tests.small_runs import nano

__all__ = ["nano"]

TEXTS = [
    "a photo of a cat.",
    "a photo of a dog.",
    "a photo of a dog",
    "a photo of",
    "",
    "a photo of a cat.",
    "art of the dog.",
    "word " * 120,
    "word " * 75,
    "一只猫坐在垫子上",
    "一只狗",
    "ein schöner Tag & <b>mehr</b>",
    "!!! ??? ...",
]


def random_texts(seed: int) -> list[str]:
    """Return sentences of few words, with common prefixes and with one that is a prefix of another."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(["a", "cat", "of", "photo", "猫"], k=draw.randint(0, 90))) for _ in range(60)]


@pytest.mark.parametrize("texts", [TEXTS, random_texts(0), random_texts(1), [""], ["one"] * 3])
@torch.no_grad()
def test_features_from_trees_equal_each_text_padded_to_the_whole_context(nano: CLIP, texts: list[str]) -> None:
    tokenizer = Tokenizer(77)
    expected = nano.encode_text(tokenizer(texts, trim=False), normalize=True)
    torch.testing.assert_close(encode_texts(nano, tokenizer, texts), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(encode_texts(nano, tokenizer, texts, batch_size=1), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("texts", [TEXTS, random_texts(2)])
def test_one_tree_has_a_node_for_each_distinct_prefix(texts: list[str]) -> None:
    tokens = Tokenizer(77).encode_batch(texts)
    beginnings = {tuple(ids[:length]) for ids in tokens for length in range(1, len(ids) + 1)}
    (tree,) = grow(tokens, nodes=10**6)
    assert len(tree.tokens) == len(beginnings)
    assert sorted(tree.texts) == list(range(len(texts)))


def test_trees_have_at_most_the_requested_nodes_unless_a_text_is_longer() -> None:
    tokens = Tokenizer(77).encode_batch([*random_texts(3), "word " * 120])
    trees = grow(tokens, nodes=50)
    assert sorted(text for tree in trees for text in tree.texts) == list(range(len(tokens)))
    assert all(len(tree.tokens) <= 50 or len(set(tree.ends)) == 1 for tree in trees)
    assert max(len(tree.tokens) for tree in grow(tokens)) <= NODES


def test_a_node_attends_to_its_own_prefix_only() -> None:
    tokens = Tokenizer(77).encode_batch(TEXTS)
    trees = grow(tokens, nodes=60)
    packed = pack(trees)
    order = [text for tree in trees for text in tree.texts]
    for text, tree, node in zip(order, packed.tree.tolist(), packed.node.tolist(), strict=True):
        seen = packed.seen[tree, node].nonzero().flatten()
        assert packed.tokens[tree, seen].tolist() == tokens[text]
        assert packed.position[tree, seen].tolist() == list(range(len(tokens[text])))


def encode(model: CLIP, trees: TokenTrees) -> torch.Tensor:
    return model.encode_text_trees(trees.tokens, TreeLayout(*trees[1:]))


@torch.no_grad()
def test_a_tree_has_the_same_features_in_a_batch_with_larger_ones(nano: CLIP) -> None:
    small, large = grow(Tokenizer(77).encode_batch(["a cat"])), grow(Tokenizer(77).encode_batch(random_texts(4)))
    alone = encode(nano, pack(small))
    beside = encode(nano, pack([*small, *large]))
    assert torch.isfinite(beside).all()
    torch.testing.assert_close(beside[:1], alone, rtol=0, atol=1e-6)
