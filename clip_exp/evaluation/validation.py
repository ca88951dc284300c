"""Metrics of a validation during training from the features of the whole validation set. Pure functions without Lightning."""

from typing import NamedTuple

import torch
from torch import Tensor

from clip_exp.evaluation.classification import accuracy, class_scores
from clip_exp.evaluation.retrieval import retrieval


class ValidationFeatures(NamedTuple):
    """Features of the validation set, each image and each caption once."""

    image_features: Tensor  # [N, D] unit norm
    text_features: Tensor  # [M, D] unit norm
    caption_image: Tensor  # [M] row of `image_features` for each caption
    labels: Tensor  # [N] class of each image, -1 for none
    caption_id: Tensor  # [M] equal captions have equal ids

    def first_captions(self) -> tuple[Tensor, Tensor]:
        """Return the images that have a caption, and the row of `text_features` of their first caption: int64 [P], [P]."""
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
    """Remove repeated rows, so that each image and caption counts once, and captions of missing images.

    All ranks get the same number of batches, so some of the gathered rows repeat.

    Args:
        index_N: index of each image in the validation set, in any order, with repeats.
        image_features_ND: image features of unit norm.
        label_N: class of each image; -1 for none.
        caption_index_M: index of each caption, with repeats.
        text_features_MD: caption features of unit norm.
        caption_image_M: index of the image of each caption.
        caption_id_M: ids of the captions; equal captions have equal ids.
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
    """Return recall and median rank in both directions over the whole validation set (`evaluation.retrieval`).

    Args:
        features: features of the validation set.
        class_embeddings_CD: output of `evaluation.classification.build_classifier`, which adds `top1` and, for more than
            five classes, `top5`, over the images that have a label.

    Raises:
        NumericError: a feature is not finite.
    """
    metrics = retrieval(features.image_features, features.text_features, features.caption_image)
    labeled = features.labels >= 0
    if class_embeddings_CD is not None and labeled.any():
        scores = class_scores(features.image_features[labeled], class_embeddings_CD)
        metrics |= accuracy(scores, features.labels[labeled])
    return metrics


def _first_rows(index_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distinct values in ascending order, and the first row of each."""
    ordered, order = index_N.sort(stable=True)
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    return ordered[first], order[first]
