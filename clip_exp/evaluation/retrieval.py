"""Retrieval: recall and median rank both ways, from the places of the right ones among all candidates; and some queries with what they found.

Places are counted without sorting and without the whole matrix of scores.
"""

from collections.abc import Iterator
from itertools import pairwise, permutations
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from clip_exp.data.image_sets import ImageSet
from clip_exp.evaluation.features import require_finite
from clip_exp.reports.retrieval_report import Query, Retrieved

RECALL_AT = (1, 5, 10)
TILE = 1024  # images of a tile, which comes with all their captions
SHOWN = 24  # queries each way
FOUND = 8  # results of a query


def retrieval(image_features_ND: Tensor, text_features_MD: Tensor, caption_image_M: Tensor) -> dict[str, float]:
    """Recall@1, 5, 10 and median rank of image-to-text and text-to-image retrieval over the whole set.

    Image to text, an image is a hit if any of its captions is among the first k; text to image, a caption has one
    image. Images without a caption are candidates for text to image, and do not count in image to text. Equal
    scores stand in random order, and a recall is its expected value over that order: a model that gives every pair the
    same score gets chance, not 0 or 1. Scores come in tiles, so memory does not grow with N * M.

    Args:
        image_features_ND, text_features_MD: unit norm, float32.
        caption_image_M: row of the image that each caption belongs to.
    Returns:
        `recall@1_i2t`, `recall@1_t2i`, …: fractions. `median_rank_i2t`, `median_rank_t2i`: 1 is best.
    Raises:
        NumericError: a feature is not finite.
    """
    require_finite(image_features_ND, "image features")
    require_finite(text_features_MD, "text features")
    caption_image_M = caption_image_M.to(image_features_ND.device)
    i2t, t2i = places(image_features_ND, text_features_MD, caption_image_M)
    return {**_summary(*i2t, "i2t"), **_summary(*t2i, "t2i")}


class Places(NamedTuple):
    """Of each query, how many candidates beat or equal the best one that is right."""

    better: Tensor  # int64 [Q], wrong candidates with a higher score
    tied: Tensor  # int64 [Q], wrong candidates with the same score
    own_tied: Tensor  # int64 [Q], right candidates with that score, 1 or more


class _Tile(NamedTuple):
    """Some images and their captions."""

    images: slice
    texts: slice  # of the captions in the order of their images
    image_features: (
        Tensor  # [TILE, D]; all tiles have one shape, so that equal features have equal scores in every product
    )
    text_features: Tensor  # [most captions of a tile, D]

    def scores(self, of_texts: "_Tile") -> Tensor:
        """Of this tile's images with another's captions, without the padding."""
        scores = self.image_features @ of_texts.text_features.T
        return scores[: self.images.stop - self.images.start, : of_texts.texts.stop - of_texts.texts.start]


def places(image_features_ND: Tensor, text_features_MD: Tensor, caption_image_M: Tensor) -> tuple[Places, Places]:
    """Of the images that have captions, in ascending order, and of the captions.

    A score is computed once and compared with the right one's both ways. The right ones' scores are taken from the same
    products first: computed otherwise they could differ in the last bit, and ties would be lost.
    """
    order = caption_image_M.argsort(stable=True)
    owner = caption_image_M[order]
    tiles = list(_tiles(image_features_ND, text_features_MD[order], owner))
    images = _Counts(image_features_ND.new_empty(len(image_features_ND)))
    texts = _Counts(image_features_ND.new_empty(len(owner)))
    own_tied = torch.zeros_like(images.better)
    for tile in tiles:
        scores = tile.scores(tile)
        rows = owner[tile.texts] - tile.images.start
        of_texts = scores[rows, torch.arange(len(rows), device=rows.device)]
        best = scores.new_full((len(scores),), -torch.inf).scatter_reduce(0, rows, of_texts, "amax")
        # Of each image its best caption's score (infinity without captions: nothing beats it) and how many have it.
        images.right[tile.images] = best.masked_fill(best == -torch.inf, torch.inf)
        own_tied[tile.images] = torch.zeros_like(best, dtype=torch.int64).scatter_add(
            0, rows, (of_texts == best[rows]).long()
        )
        texts.right[tile.texts] = of_texts
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
    for found, queries, dim in ((images, row.images, 1), (texts, column.texts, 0)):
        right = found.right[queries].unsqueeze(dim)
        # Torch sums bytes faster than truth values.
        found.better[queries] += (scores > right).view(torch.uint8).sum(dim, dtype=torch.int32)
        found.reached[queries] += (scores >= right).view(torch.uint8).sum(dim, dtype=torch.int32)


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


def _summary(better: Tensor, tied: Tensor, own_tied: Tensor, way: str) -> dict[str, float]:
    better, tied, own_tied = better.double(), tied.double(), own_tied.double()
    metrics = {f"recall@{k}_{way}": _hit_probability(k - better, tied, own_tied).mean().item() for k in RECALL_AT}
    ranks = (better + tied / (own_tied + 1)).sort().values  # candidates expected before the first own one
    middle = (ranks[(len(ranks) - 1) // 2] + ranks[len(ranks) // 2]) / 2
    return {**metrics, f"median_rank_{way}": middle.floor().item() + 1}


def _hit_probability(first: Tensor, tied: Tensor, own: Tensor) -> Tensor:
    """Chance that an own candidate is in the first s places of a random order of o own and t others.

    1 - C(t, s) / C(o + t, s).
    """
    s = first.clamp(min=0).minimum(tied)
    log_miss = (
        torch.lgamma(tied + 1)
        - torch.lgamma(tied - s + 1)
        - torch.lgamma(own + tied + 1)
        + torch.lgamma(own + tied - s + 1)
    )
    hit = torch.where(first > tied, 1.0, 1 - log_miss.exp())
    return torch.where(first > 0, hit, 0.0)


def examples(
    image_features_ND: Tensor,
    text_features_MD: Tensor,
    caption_image_M: Tensor,
    kept_N: Tensor,
    captions: list[str],
    images: ImageSet,
) -> Retrieved:
    """Queries spread evenly over the set, both ways.

    Args:
        kept_N: which of `images` each row is.
    """
    queries = caption_image_M.unique()
    queries = queries[_spread(len(queries)).to(queries.device)]
    texts = _spread(len(captions)).to(queries.device)
    own_images = caption_image_M[None, :] == queries[:, None]
    own_texts = F.one_hot(caption_image_M[texts], len(image_features_ND)).bool()
    i2t = _queries(image_features_ND[queries] @ text_features_MD.T, own_images)
    t2i = _queries(text_features_MD[texts] @ image_features_ND.T, own_texts)
    numbers = kept_N.tolist()
    return Retrieved(
        images,
        captions,
        [Query(numbers[query], *rest) for query, rest in zip(queries.tolist(), i2t, strict=True)],
        [
            Query(query, [numbers[row] for row in found], scores, right, rank)
            for query, (found, scores, right, rank) in zip(texts.tolist(), t2i, strict=True)
        ],
    )


def _spread(count: int) -> Tensor:
    return torch.linspace(0, count - 1, min(SHOWN, count)).round().long()


def _queries(scores_QC: Tensor, right_QC: Tensor) -> list[tuple[list[int], list[float], list[bool], int]]:
    """Of each query: its best candidates, their scores, which are right, and the place of the first right one."""
    best = scores_QC.topk(min(FOUND, scores_QC.shape[1]), dim=1)
    best_right = scores_QC.masked_fill(~right_QC, -torch.inf).amax(dim=1, keepdim=True)
    ranks = (scores_QC > best_right).sum(dim=1) + 1
    right = right_QC.gather(1, best.indices)
    columns = (best.indices.tolist(), best.values.tolist(), right.tolist(), ranks.tolist())
    return list(zip(*columns, strict=True))
