"""Retrieval recall and classification accuracy. Pure functions of features, scores and labels."""

import torch
from torch import Tensor

from clip_exp.errors import NumericError
from clip_exp.evaluation.places import places
from clip_exp.reports.metric_names import CERTAIN

RECALL_AT = (1, 5, 10)


def retrieval(image_features_ND: Tensor, text_features_MD: Tensor, caption_image_M: Tensor) -> dict[str, float]:
    """Recall@1, 5, 10 and median rank of image-to-text and text-to-image retrieval over the whole set.

    Image to text, a picture is a hit if any of its captions is among the first k; text to image, a caption has one
    picture. Pictures without a caption are candidates for text to image, and do not count in image to text. Equal
    scores stand in random order, and a recall is its expected value over that order: a model that gives every pair the
    same score gets chance, not 0 or 1. Scores come in tiles, so memory does not grow with N * M.

    Args:
        image_features_ND, text_features_MD: unit norm, float32.
        caption_image_M: row of the picture that each caption belongs to.
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


def accuracy(scores_NC: Tensor, labels_N: Tensor) -> dict[str, float]:
    """Fraction of rows whose label has the best score (`top1`), and of more than five classes one of the best five (`top5`)."""
    return top_k(best_classes(scores_NC), labels_N, scores_NC.shape[1])


def accuracies(best_NK: Tensor, labels_N: Tensor, num_classes: int) -> dict[str, float]:
    """Fractions over all images, each counted once: `top1`, `mean_per_class_recall`, and of more than five classes `top5`.

    Args:
        best_NK: `best_classes`.
        labels_N: the class of each picture.
    """
    recall = mean_per_class_recall(best_NK[:, 0], labels_N, num_classes)
    return {**top_k(best_NK, labels_N, num_classes), "mean_per_class_recall": recall}


def best_classes(scores_NC: Tensor) -> Tensor:
    """[N, 5] (fewer for fewer classes), best first. Of equal scores `topk` picks, as in the published numbers."""
    return scores_NC.topk(min(5, scores_NC.shape[1]), dim=1).indices


def top_k(best_NK: Tensor, labels_N: Tensor, num_classes: int) -> dict[str, float]:
    """Return `top1`, and of more than five classes `top5`, from `best_classes`. Of fewer, `top5` would be 1 for any model."""
    hit_NK = best_NK == labels_N[:, None]
    top1 = {"top1": hit_NK[:, 0].double().mean().item()}
    return top1 if num_classes <= CERTAIN else {**top1, "top5": hit_NK.any(dim=1).double().mean().item()}


def mean_per_class_recall(predicted_N: Tensor, labels_N: Tensor, num_classes: int) -> float:
    """Accuracy within each class, averaged over the classes that have pictures."""
    count_C = torch.bincount(labels_N, minlength=num_classes)
    hits_C = torch.bincount(labels_N[predicted_N == labels_N], minlength=num_classes)
    present = count_C > 0
    return (hits_C[present].double() / count_C[present]).mean().item()


def require_finite(features: Tensor, what: str) -> None:
    """Comparisons with NaN are false, which would count as a perfect rank.

    Raises:
        NumericError: a value is NaN or infinite.
    """
    if not torch.isfinite(features.sum()):  # features are small, so a sum that is not finite has such a part
        raise NumericError(
            f"The {what} hold NaN or infinite values: the weights are broken, or overflow in this precision."
        )


def _summary(better: Tensor, tied: Tensor, own_tied: Tensor, way: str) -> dict[str, float]:
    better, tied, own_tied = better.double(), tied.double(), own_tied.double()
    metrics = {f"recall@{k}_{way}": _hit_probability(k - better, tied, own_tied).mean().item() for k in RECALL_AT}
    ranks = (better + tied / (own_tied + 1)).sort().values  # candidates expected before the first own one
    middle = (ranks[(len(ranks) - 1) // 2] + ranks[len(ranks) // 2]) / 2
    return {**metrics, f"median_rank_{way}": middle.floor().item() + 1}


def _hit_probability(places: Tensor, tied: Tensor, own: Tensor) -> Tensor:
    """Chance that an own candidate is in the first s places of a random order of o own and t others.

    1 - C(t, s) / C(o + t, s).
    """
    s = places.clamp(min=0).minimum(tied)
    log_miss = (
        torch.lgamma(tied + 1)
        - torch.lgamma(tied - s + 1)
        - torch.lgamma(own + tied + 1)
        + torch.lgamma(own + tied - s + 1)
    )
    hit = torch.where(places > tied, 1.0, 1 - log_miss.exp())
    return torch.where(places > 0, hit, 0.0)
