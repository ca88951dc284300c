"""Texts that begin alike, as trees of tokens: each distinct beginning is in a tree once, so a causal tower computes it once.

The prompts of a zero-shot classifier are a few dozen templates with a thousand names each: 80,000 prompts of ImageNet have
770 thousand tokens and 330 thousand distinct beginnings.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

NODES = 160  # of a tree: more waste time in attention across branches, fewer repeat the beginnings in more trees


class TreeLayout(NamedTuple):
    """Texts that share their beginnings, as paths of trees.

    A token's state depends on what stands before it alone, so texts that begin alike are one path up to where they part.
    """

    position_BN: Tensor  # int64, tokens that stand before each node
    seen_BNN: Tensor  # bool, whether a node sees the node of the last axis
    tree_E: Tensor  # int64, where each text ends: in which tree,
    node_E: Tensor  # int64, and at which node


class TokenTrees(NamedTuple):
    """B trees of up to N tokens that hold E texts."""

    tokens: Tensor  # int64 [B, N], zero-padded
    position: Tensor  # int64 [B, N], depth below the root
    seen: Tensor  # bool [B, N, N], whether the node of the last axis is on the way from the root to a node, itself included
    tree: Tensor  # int64 [E], where each text ends: in which tree,
    node: Tensor  # int64 [E], and at which node


class Tree:
    """A tree under construction, and the texts that end in it."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.depths: list[int] = []
        self.ends: list[int] = []  # node of each text
        self.texts: list[int] = []  # which text that is
        self._path: list[int] = []  # nodes of the latest text

    def room_for(self, tokens: Sequence[int]) -> int:
        """New nodes that a text needs."""
        return len(tokens) - self._shared(tokens)

    def add(self, text: int, tokens: Sequence[int]) -> None:
        """Texts come in sorted order, so what a text shares with the tree it shares with the latest text."""
        shared = self._shared(tokens)
        del self._path[shared:]
        for depth in range(shared, len(tokens)):
            self.parents.append(self._path[-1] if self._path else -1)
            self._path.append(len(self.tokens))
            self.tokens.append(tokens[depth])
            self.depths.append(depth)
        self.ends.append(self._path[-1])
        self.texts.append(text)

    def _shared(self, tokens: Sequence[int]) -> int:
        limit = min(len(self._path), len(tokens))
        return next((i for i in range(limit) if self.tokens[self._path[i]] != tokens[i]), limit)


def grow(token_lists: Sequence[Sequence[int]], nodes: int = NODES) -> list[Tree]:
    """Trees of at most `nodes` tokens (or of one longer text) that together hold every text once."""
    trees = [Tree()]
    for text in sorted(range(len(token_lists)), key=lambda text: list(token_lists[text])):
        tokens = token_lists[text]
        if trees[-1].tokens and len(trees[-1].tokens) + trees[-1].room_for(tokens) > nodes:
            trees.append(Tree())
        trees[-1].add(text, tokens)
    return trees


def pack(trees: Sequence[Tree]) -> TokenTrees:
    """Trees as tensors; their texts in the order of the trees."""
    size = max(len(tree.tokens) for tree in trees)
    tokens = np.zeros((len(trees), size), dtype=np.int64)
    position = np.zeros((len(trees), size), dtype=np.int64)
    # A padding node sees itself: a row of attention that sees nothing is NaN.
    seen = np.broadcast_to(np.eye(size, dtype=bool), (len(trees), size, size)).copy()
    for row, tree in enumerate(trees):
        tokens[row, : len(tree.tokens)] = tree.tokens
        position[row, : len(tree.depths)] = tree.depths
        for node, parent in enumerate(tree.parents):
            if parent >= 0:
                seen[row, node] |= seen[row, parent]
    return TokenTrees(
        torch.from_numpy(tokens),
        torch.from_numpy(position),
        torch.from_numpy(seen),
        torch.tensor([row for row, tree in enumerate(trees) for _ in tree.ends]),
        torch.tensor([node for tree in trees for node in tree.ends]),
    )
