"""The best of many by their scores."""

from typing import NamedTuple

import torch
from torch import Tensor

from clip_exp.devices import exact_float32
from clip_exp.evaluation.features import require_finite

ROWS = 1 << 16  # features scored at a time: 128 MB of 512 float32 values


class Match(NamedTuple):
    """A picture or video that fits a query."""

    path: str  # "picture <position>" for one in memory
    score: float  # cosine of its features with the query's, -1 to 1
    position: int  # among what was given, or in the index


@exact_float32()
def cosines(features_ND: Tensor, query_D: Tensor) -> Tensor:
    """Exact cosines [N], float32, of unit-norm features that may be mapped from a file: read in tiles."""
    return torch.cat([tile.float() @ query_D for tile in features_ND.split(ROWS)])


def best(scores_N: Tensor, keep: int | None = None) -> Tensor:
    """Positions of the highest scores, int64 [min(keep, N)], best first; equal ones in their order. `keep` None: all."""
    if keep is not None and keep < len(scores_N):
        candidates = (scores_N >= scores_N.topk(keep).values[-1]).nonzero().flatten()
    else:
        candidates = torch.arange(len(scores_N))
    return candidates[scores_N[candidates].argsort(descending=True, stable=True)][:keep]


def best_matches(features_ND: Tensor, query_D: Tensor, keep: int | None = None) -> list[tuple[int, float]]:
    """Return the rows whose features fit a query best and their cosines, best first; equal ones in their order.

    Raises:
        NumericError: a score is not finite.
    """
    scores_N = cosines(features_ND, query_D)
    require_finite(scores_N, "scores")
    return [(row, scores_N[row].item()) for row in best(scores_N, keep).tolist()]
