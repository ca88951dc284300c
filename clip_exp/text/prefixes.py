"""Prefix trees of tokenized texts. A common prefix of several texts occurs once in a tree, so a causal tower computes it once.

The prompts of a zero-shot classifier combine a few dozen templates with a thousand class names: the 80,000 prompts of
ImageNet have 770,000 tokens, but only 330,000 distinct prefixes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# Maximum number of nodes in a tree. Larger trees waste time in attention across branches; smaller ones repeat prefixes
# in more trees.
NODES = 160


class TreeLayout(NamedTuple):
    """Structure of B prefix trees of up to N tokens with E texts.

    In a causal tower, the state of a token depends only on the tokens before it, so texts share a path up to the point
    where they differ.

    Attributes:
        position_BN: int64, number of tokens before each node.
        seen_BNN: bool, attention mask: True if a node attends to the node of the last axis.
        tree_E: int64, index of the tree of each text.
        node_E: int64, index of the last node of each text.
    """

    position_BN: Tensor
    seen_BNN: Tensor
    tree_E: Tensor
    node_E: Tensor


class TokenTrees(NamedTuple):
    """B prefix trees of up to N tokens with E texts.

    Attributes:
        tokens: int64 [B, N], zero-padded tokens.
        position: int64 [B, N], depth of each node.
        seen: bool [B, N, N], attention mask: True if the node of the last axis is on the path from the root to a node,
            including the node itself.
        tree: int64 [E], index of the tree of each text.
        node: int64 [E], index of the last node of each text.
    """

    tokens: Tensor
    position: Tensor
    seen: Tensor
    tree: Tensor
    node: Tensor


class Tree:
    """Prefix tree under construction.

    Attributes:
        tokens: token of each node.
        parents: index of the parent of each node, -1 for a root.
        depths: depth of each node.
        ends: index of the last node of each text.
        texts: index of each text.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.depths: list[int] = []
        self.ends: list[int] = []
        self.texts: list[int] = []
        # Nodes of the last text
        self._path: list[int] = []

    def room_for(self, tokens: Sequence[int]) -> int:
        """Return the number of nodes that adding a text would create."""
        return len(tokens) - self._shared(tokens)

    def add(self, text: int, tokens: Sequence[int]) -> None:
        """Add a text. Since texts are added in sorted order, it shares a prefix only with the last text."""
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
    """Build trees of at most `nodes` tokens (or of a single longer text) that contain every text once."""
    trees = [Tree()]
    for text in sorted(range(len(token_lists)), key=lambda text: list(token_lists[text])):
        tokens = token_lists[text]
        if trees[-1].tokens and len(trees[-1].tokens) + trees[-1].room_for(tokens) > nodes:
            trees.append(Tree())
        trees[-1].add(text, tokens)
    return trees


def pack(trees: Sequence[Tree]) -> TokenTrees:
    """Convert trees to tensors. Texts are in the order of the trees."""
    size = max(len(tree.tokens) for tree in trees)
    tokens = np.zeros((len(trees), size), dtype=np.int64)
    position = np.zeros((len(trees), size), dtype=np.int64)
    # Padding nodes attend to themselves, since the softmax of a completely masked row is NaN.
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
