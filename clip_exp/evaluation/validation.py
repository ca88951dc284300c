"""What a validation during training computes from the features of the whole set. Pure functions, no Lightning."""

from typing import NamedTuple

import torch
from torch import Tensor

from clip_exp.evaluation.classification import accuracy, class_scores
from clip_exp.evaluation.retrieval import retrieval


class ValidationFeatures(NamedTuple):
    """The validation set, each image and each caption once."""

    image_features: Tensor  # [N, D] unit norm
    text_features: Tensor  # [M, D] unit norm
    caption_image: Tensor  # [M] row of `image_features` that each caption belongs to
    labels: Tensor  # [N] class of each image, -1 for none
    caption_id: Tensor  # [M] equal for equal captions

    def first_captions(self) -> tuple[Tensor, Tensor]:
        """The images that have a caption, and the row of `text_features` of each one's first: int64 [P], [P]."""
        return _first_rows(self.caption_image)


def deduplicate(
    index_N: Tensor,
    image_features_ND: Tensor,
    label_N: Tensor,
    caption_index_M: Tensor,
    text_features_MD: Tensor,
    caption_image_M: Tensor,
    caption_id_M: Tensor,
) -> ValidationFeatures:
    """Drop what the ranks saw twice, so that it counts once.

    Ranks get equally many batches, wrapped round, so gathered rows repeat. Captions of missing images go too.

    Args:
        index_N: number of each image in the validation set; repeats allowed, any order.
        label_N: class of each image, -1 for none.
        caption_index_M: number of each caption; repeats allowed.
        caption_image_M: number of the image that each caption belongs to.
        caption_id_M: equal for equal captions.
    """
    images, image_rows = _first_rows(index_N)
    _, text_rows = _first_rows(caption_index_M)
    text_rows = text_rows[torch.isin(caption_image_M[text_rows], images)]
    return ValidationFeatures(
        image_features_ND[image_rows],
        text_features_MD[text_rows],
        torch.searchsorted(images, caption_image_M[text_rows]),
        label_N[image_rows],
        caption_id_M[text_rows],
    )


def validation_metrics(features: ValidationFeatures, class_embeddings_CD: Tensor | None = None) -> dict[str, float]:
    """Recall and median rank both ways over the whole set (`evaluation.retrieval`).

    With the class embeddings of `evaluation.classification.build_classifier` also zero-shot `top1` and, of more than
    five classes, `top5`, over the images that have a label.

    Raises:
        NumericError: a feature is not finite.
    """
    metrics = retrieval(features.image_features, features.text_features, features.caption_image)
    labelled = features.labels >= 0
    if class_embeddings_CD is not None and labelled.any():
        scores = class_scores(features.image_features[labelled], class_embeddings_CD)
        metrics |= accuracy(scores, features.labels[labelled])
    return metrics


def _first_rows(index_N: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct values in ascending order, and the first row that holds each."""
    ordered, order = index_N.sort(stable=True)
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    return ordered[first], order[first]
