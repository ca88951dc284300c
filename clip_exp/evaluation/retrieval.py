"""Retrieval: recall and median rank in both directions from the ranks of the correct candidates, and example queries.

Ranks are counted without sorting and without the full score matrix.
"""

from collections.abc import Iterator
from itertools import pairwise, permutations
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from clip_exp.data.files import ImageLimits
from clip_exp.data.image_sets import ImageSet
from clip_exp.evaluation.features import require_finite
from clip_exp.reports.retrieval_report import Query, Retrieved

RECALL_AT = (1, 5, 10)
TILE = 1024  # images per tile, which has all their captions
SHOWN = 24  # example queries per direction
FOUND = 8  # results per example query


def retrieval(image_features_ND: Tensor, text_features_MD: Tensor, caption_image_M: Tensor) -> dict[str, float]:
    """Return recall@1, 5, 10 and median rank of image-to-text and text-to-image retrieval over the whole dataset.

    Image to text, an image is a hit if any of its captions is in the top k. Text to image, a caption has one image. Images
    without a caption are candidates for text to image, and are not queries for image to text. Ties are in random order, and a
    recall is the expected value over that order: a model that gives all pairs the same score is at chance level, not at 0 or
    1. Scores are computed in tiles, so memory does not grow with N * M.

    Args:
        image_features_ND: image features, unit norm, float32.
        text_features_MD: caption features, unit norm, float32.
        caption_image_M: row of the image of each caption.

    Returns:
        `recall@1_i2t`, `recall@1_t2i`, …, as fractions, and `median_rank_i2t`, `median_rank_t2i`, where 1 is best.

    Raises:
        NumericError: a feature is not finite.
    """
    require_finite(image_features_ND, "image features")
    require_finite(text_features_MD, "text features")
    caption_image_M = caption_image_M.to(image_features_ND.device)
    i2t, t2i = ranks(image_features_ND, text_features_MD, caption_image_M)
    return {**_summary(*i2t, "i2t"), **_summary(*t2i, "t2i")}


class Ranks(NamedTuple):
    """Numbers of candidates with a higher or the same score as the best correct candidate of each query."""

    better: Tensor  # int64 [Q], incorrect candidates with a higher score
    tied: Tensor  # int64 [Q], incorrect candidates with the same score
    own_tied: Tensor  # int64 [Q], correct candidates with that score, 1 or more


class _Tile(NamedTuple):
    """Part of the images with their captions."""

    images: slice
    texts: slice  # of the captions in the order of their images
    # All tiles have one shape, so that equal features have equal scores in every matrix product.
    image_features: Tensor  # [TILE, D]
    text_features: Tensor  # [largest number of captions of a tile, D]

    def scores(self, of_texts: "_Tile") -> Tensor:
        """Return the scores of the images of this tile with the captions of another, without padding."""
        scores = self.image_features @ of_texts.text_features.T
        return scores[: self.images.stop - self.images.start, : of_texts.texts.stop - of_texts.texts.start]


def ranks(image_features_ND: Tensor, text_features_MD: Tensor, caption_image_M: Tensor) -> tuple[Ranks, Ranks]:
    """Return the ranks of the images that have captions, in ascending order, and of the captions.

    A score is computed once and used in both directions. The scores of the correct pairs are taken from the same matrix
    products: computed in another way they could differ in the last bit, and ties would be lost.
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
        # The score of the best caption of each image, infinity without captions, and how many of its captions have it.
        images.correct[tile.images] = best.masked_fill(best == -torch.inf, torch.inf)
        own_tied[tile.images] = torch.zeros_like(best, dtype=torch.int64).scatter_add(
            0, rows, (of_texts == best[rows]).long()
        )
        texts.correct[tile.texts] = of_texts
        _compare(scores, tile, tile, images, texts)
    for row, column in permutations(tiles, 2):
        _compare(row.scores(column), row, column, images, texts)
    queries = owner.unique()
    back = order.argsort()
    return (
        Ranks(images.better[queries], (images.reached - images.better - own_tied)[queries], own_tied[queries]),
        Ranks(texts.better[back], (texts.reached - texts.better)[back] - 1, torch.ones_like(owner)),
    )


class _Counts:
    """Score of the best correct candidate of each query, and numbers of candidates with a higher, or at least that score."""

    def __init__(self, correct: Tensor) -> None:
        self.correct = correct
        self.better = torch.zeros_like(correct, dtype=torch.int64)
        self.reached = torch.zeros_like(correct, dtype=torch.int64)


def _compare(scores: Tensor, row: _Tile, column: _Tile, images: _Counts, texts: _Counts) -> None:
    for found, queries, dim in ((images, row.images, 1), (texts, column.texts, 0)):
        correct = found.correct[queries].unsqueeze(dim)
        # Torch sums bytes faster than booleans.
        found.better[queries] += (scores > correct).view(torch.uint8).sum(dim, dtype=torch.int32)
        found.reached[queries] += (scores >= correct).view(torch.uint8).sum(dim, dtype=torch.int32)


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


def _summary(better: Tensor, tied: Tensor, own_tied: Tensor, direction: str) -> dict[str, float]:
    better, tied, own_tied = better.double(), tied.double(), own_tied.double()
    metrics = {f"recall@{k}_{direction}": _hit_probability(k - better, tied, own_tied).mean().item() for k in RECALL_AT}
    before = (
        (better + tied / (own_tied + 1)).sort().values
    )  # expected number of candidates before the first correct one
    middle = (before[(len(before) - 1) // 2] + before[len(before) // 2]) / 2
    return {**metrics, f"median_rank_{direction}": middle.floor().item() + 1}


def _hit_probability(first: Tensor, tied: Tensor, own: Tensor) -> Tensor:
    """Return the probability that a correct candidate is among the first s of a random order of o correct and t others.

    It is 1 - C(t, s) / C(o + t, s).

    Args:
        first: s, which is clamped to 0 and t.
        tied: t.
        own: o.
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
    limits: ImageLimits,
) -> Retrieved:
    """Return example queries in both directions, sampled evenly from the dataset.

    Args:
        image_features_ND: image features, unit norm, float32.
        text_features_MD: caption features, unit norm, float32.
        caption_image_M: row of the image of each caption.
        kept_N: position in `images` of each row of `image_features_ND`.
        captions: captions of the rows of `text_features_MD`.
        images: images of the dataset.
        limits: limits with which the images were read.
    """
    queries = caption_image_M.unique()
    queries = queries[_evenly(len(queries)).to(queries.device)]
    texts = _evenly(len(captions)).to(queries.device)
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
            Query(query, [numbers[row] for row in found], scores, correct, rank)
            for query, (found, scores, correct, rank) in zip(texts.tolist(), t2i, strict=True)
        ],
        limits,
    )


def _evenly(count: int) -> Tensor:
    return torch.linspace(0, count - 1, min(SHOWN, count)).round().long()


def _queries(scores_QC: Tensor, correct_QC: Tensor) -> list[tuple[list[int], list[float], list[bool], int]]:
    """Return for each query its top candidates, their scores, which are correct, and the rank of the first correct one."""
    best = scores_QC.topk(min(FOUND, scores_QC.shape[1]), dim=1)
    best_correct = scores_QC.masked_fill(~correct_QC, -torch.inf).amax(dim=1, keepdim=True)
    ranks = (scores_QC > best_correct).sum(dim=1) + 1
    correct = correct_QC.gather(1, best.indices)
    columns = (best.indices.tolist(), best.values.tolist(), correct.tolist(), ranks.tolist())
    return list(zip(*columns, strict=True))
