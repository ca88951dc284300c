"""Zero-shot classification by the published protocol (Radford et al. 2021, section 3.1.4, and their notebook)."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from clip_exp.evaluation.encode import TextEncoder, Tokenizes, encode_distinct_texts
from clip_exp.evaluation.metrics import best_classes, mean_per_class_recall, require_finite, top_k
from clip_exp.evaluation.prompts import class_prompts

SCALE = 100.0  # the published factor of the cosines: the upper bound of the logit scale
CHUNK = 8192  # pictures scored at a time: 33 MB of scores for 1,000 classes


def build_classifier(
    model: TextEncoder,
    tokenizer: Tokenizes,
    class_names: Sequence[str],
    templates: Sequence[str],
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> Tensor:
    """One embedding per class: filled-in templates embedded, each normalised, averaged, normalised again.

    Runs in the precision of the weights, outside autocast. Classes of the same name get the same embedding and stay
    separate classes.

    Args:
        templates: each with `{}` in the place of the name.
        batch_size: prompts encoded at a time.
    Returns:
        [C, D] float32, unit norm, on `device`.
    """
    prompts = [prompt for name in class_names for prompt in class_prompts(name, list(templates))]
    features_PD, index = encode_distinct_texts(
        model, tokenizer, prompts, batch_size, device, "prompts" if progress else None
    )
    mean_CD = F.embedding_bag(index.view(len(class_names), len(templates)), features_PD, mode="mean")
    return F.normalize(mean_CD, dim=-1)


def class_scores(image_features_ND: Tensor, class_embeddings_CD: Tensor) -> Tensor:
    """[N, C]: 100 * cosine."""
    return SCALE * image_features_ND @ class_embeddings_CD.T


def classify_dataset(image_features_ND: Tensor, labels_N: Tensor, class_embeddings_CD: Tensor) -> dict[str, float]:
    """`top1`, `top5` and `mean_per_class_recall` over all pictures, each counted once; as fractions.

    Args:
        image_features_ND: unit norm.
        labels_N: row of `class_embeddings_CD` that each picture belongs to.
    Raises:
        NumericError: a feature is not finite.
    """
    require_finite(image_features_ND, "image features")
    require_finite(class_embeddings_CD, "class embeddings")
    labels_N = labels_N.to(class_embeddings_CD.device)
    chunks = image_features_ND.split(CHUNK)
    best_NK = torch.cat(
        [best_classes(class_scores(chunk.to(labels_N.device), class_embeddings_CD)) for chunk in chunks]
    )
    recall = mean_per_class_recall(best_NK[:, 0], labels_N, len(class_embeddings_CD))
    return {**top_k(best_NK, labels_N), "mean_per_class_recall": recall}
