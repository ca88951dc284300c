"""Where the right ones stand among all candidates of a retrieval, both ways, without sorting and without the whole matrix."""

from collections.abc import Iterator
from itertools import pairwise, permutations
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

TILE = 1024  # pictures of a tile, which comes with all their captions


class Places(NamedTuple):
    """Of each query, how many candidates beat or equal the best one that is right."""

    better: Tensor  # int64 [Q], wrong candidates with a higher score
    tied: Tensor  # int64 [Q], wrong candidates with the same score
    own_tied: Tensor  # int64 [Q], right candidates with that score, 1 or more


class _Tile(NamedTuple):
    """Some pictures and their captions."""

    images: slice
    texts: slice  # of the captions in the order of their pictures
    image_features: (
        Tensor  # [TILE, D]; all tiles have one shape, so that equal features have equal scores in every product
    )
    text_features: Tensor  # [most captions of a tile, D]

    def scores(self, of_texts: "_Tile") -> Tensor:
        """Of this tile's pictures with another's captions, without the padding."""
        scores = self.image_features @ of_texts.text_features.T
        return scores[: self.images.stop - self.images.start, : of_texts.texts.stop - of_texts.texts.start]


def places(image_features_ND: Tensor, text_features_MD: Tensor, caption_image_M: Tensor) -> tuple[Places, Places]:
    """Of the pictures that have captions, in ascending order, and of the captions.

    A score is computed once and compared with the right one's both ways. The right ones' scores are taken from the same
    products first: computed otherwise they could differ in the last bit, and ties would be lost.

    Args:
        image_features_ND, text_features_MD: unit norm, float32.
        caption_image_M: row of the picture that each caption belongs to.
    """
    order = caption_image_M.argsort(stable=True)
    owner = caption_image_M[order]
    tiles = list(_tiles(image_features_ND, text_features_MD[order], owner))
    images = _Counts(image_features_ND.new_empty(len(image_features_ND)))
    texts = _Counts(image_features_ND.new_empty(len(owner)))
    own_tied = torch.zeros_like(images.better)
    for tile in tiles:
        scores = tile.scores(tile)
        images.right[tile.images], own_tied[tile.images], texts.right[tile.texts] = _right(scores, tile, owner)
        _compare(scores, tile, tile, images, texts)
    for row, column in permutations(tiles, 2):
        _compare(row.scores(column), row, column, images, texts)
    queries = owner.unique()
    back = order.argsort()
    return (
        Places(images.better[queries], (images.reached - images.better - own_tied)[queries], own_tied[queries]),
        Places(texts.better[back], (texts.reached - texts.better)[back] - 1, torch.ones_like(owner)),
    )


class _Counts:
    """Of each query the score of its best right candidate, and how many candidates have more, and at least as much."""

    def __init__(self, right: Tensor) -> None:
        self.right = right
        self.better = torch.zeros_like(right, dtype=torch.int64)
        self.reached = torch.zeros_like(right, dtype=torch.int64)


def _compare(scores: Tensor, row: _Tile, column: _Tile, images: _Counts, texts: _Counts) -> None:
    for counts, queries, dim in ((images, row.images, 1), (texts, column.texts, 0)):
        right = counts.right[queries].unsqueeze(dim)
        # Torch sums bytes faster than truth values.
        counts.better[queries] += (scores > right).view(torch.uint8).sum(dim, dtype=torch.int32)
        counts.reached[queries] += (scores >= right).view(torch.uint8).sum(dim, dtype=torch.int32)


def _tiles(image_ND: Tensor, text_MD: Tensor, owner_M: Tensor) -> Iterator[_Tile]:
    count = max(1, -(-len(image_ND) // TILE))
    size = -(-len(image_ND) // count)
    starts = torch.arange(0, len(image_ND), size, device=owner_M.device)
    texts = [*torch.searchsorted(owner_M, starts).tolist(), len(owner_M)]
    width = max(end - start for start, end in pairwise(texts))
    for start, (first, end) in zip(starts.tolist(), pairwise(texts), strict=True):
        images = slice(start, min(start + size, len(image_ND)))
        yield _Tile(images, slice(first, end), _padded(image_ND[images], size), _padded(text_MD[first:end], width))


def _padded(rows: Tensor, size: int) -> Tensor:
    return rows if len(rows) == size else F.pad(rows, (0, 0, 0, size - len(rows)))


def _right(scores: Tensor, tile: _Tile, owner_M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each picture its best caption's score (infinity without captions: nothing beats it) and how many have it; of each caption its picture's."""
    rows = owner_M[tile.texts] - tile.images.start
    of_texts = scores[rows, torch.arange(len(rows), device=rows.device)]
    best = scores.new_full((len(scores),), -torch.inf).scatter_reduce(0, rows, of_texts, "amax")
    tied = torch.zeros_like(best, dtype=torch.int64).scatter_add(0, rows, (of_texts == best[rows]).long())
    return best.masked_fill(best == -torch.inf, torch.inf), tied, of_texts
