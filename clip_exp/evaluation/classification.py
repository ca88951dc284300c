"""Zero-shot classification by the published protocol (Radford et al. 2021, section 3.1.4, and their notebook)."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from clip_exp.evaluation.encode import TextModel, Tokenizes, encode_distinct_texts
from clip_exp.evaluation.metrics import best_classes, require_finite
from clip_exp.evaluation.sets.prompts import class_prompts

SCALE = 100.0  # the published factor of the cosines: the upper bound of the logit scale
CHUNK = 8192  # pictures scored at a time: 33 MB of scores for 1,000 classes


def build_classifier(
    model: TextModel,
    tokenizer: Tokenizes,
    class_names: Sequence[str],
    templates: Sequence[str],
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    what: str | None = None,
    shared: bool = False,
) -> Tensor:
    """One embedding per class: filled-in templates embedded, each normalised, averaged, normalised again.

    Runs in the precision of the weights, outside autocast. Classes of the same name get the same embedding and stay
    separate classes.

    Args:
        templates: each with `{}` in the place of the name.
        batch_size: prompts encoded at a time.
        what: name of the progress bar; None for none.
        shared: the ranks divide the work; all of them must call.
    Returns:
        [C, D] float32, unit norm, on `device`.
    """
    prompts = [prompt for name in class_names for prompt in class_prompts(name, list(templates))]
    features_PD, index = encode_distinct_texts(model, tokenizer, prompts, batch_size, device, what, shared)
    mean_CD = F.embedding_bag(index.view(len(class_names), len(templates)), features_PD, mode="mean")
    return F.normalize(mean_CD, dim=-1)


def class_scores(image_features_ND: Tensor, class_embeddings_CD: Tensor) -> Tensor:
    """[N, C]: 100 * cosine."""
    return SCALE * image_features_ND @ class_embeddings_CD.T


def classify(image_features_ND: Tensor, class_embeddings_CD: Tensor) -> tuple[Tensor, Tensor]:
    """The five best classes of each picture (all, if they are fewer), best first, and their probabilities among all.

    Args:
        image_features_ND: unit norm.
    Returns:
        int64 [N, K] and float32 [N, K], on the CPU.
    Raises:
        NumericError: a feature is not finite.
    """
    require_finite(image_features_ND, "image features")
    require_finite(class_embeddings_CD, "class embeddings")
    best, probabilities = [], []
    for chunk in image_features_ND.split(CHUNK):
        scores = class_scores(chunk.to(class_embeddings_CD.device), class_embeddings_CD)
        best.append(best_classes(scores).cpu())
        probabilities.append(scores.softmax(dim=1).cpu().gather(1, best[-1]))
    return torch.cat(best), torch.cat(probabilities)
