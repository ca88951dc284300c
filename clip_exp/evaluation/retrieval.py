"""What a person wants to see of a retrieval: some queries and what they found."""

import torch
from torch import Tensor

from clip_exp.data.pictures import Pictures
from clip_exp.reports.results import Query, Retrieved

SHOWN = 24  # queries each way
FOUND = 8  # results of a query


def examples(
    image_features_ND: Tensor,
    text_features_MD: Tensor,
    caption_image_M: Tensor,
    kept_N: Tensor,
    captions: list[str],
    pictures: Pictures,
) -> Retrieved:
    """Queries spread evenly over the set, both ways.

    Args:
        image_features_ND, text_features_MD: unit norm.
        caption_image_M: row of the picture that each caption belongs to.
        kept_N: which of `pictures` each row is.
    """
    images = caption_image_M.unique()
    images = images[_spread(len(images)).to(images.device)]
    texts = _spread(len(captions)).to(images.device)
    own_images = caption_image_M[None, :] == images[:, None]
    own_texts = torch.nn.functional.one_hot(caption_image_M[texts], len(image_features_ND)).bool()
    i2t = _queries(image_features_ND[images] @ text_features_MD.T, own_images)
    t2i = _queries(text_features_MD[texts] @ image_features_ND.T, own_texts)
    numbers = kept_N.tolist()
    return Retrieved(
        pictures,
        captions,
        [Query(numbers[query], *rest) for query, rest in zip(images.tolist(), i2t, strict=True)],
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
