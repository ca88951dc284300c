"""Zero-shot classification by the published protocol (Radford et al. 2021, section 3.1.4, and their notebook), and the accuracy of any other."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from clip_exp.evaluation.features import EncodedImages, TextModel, encode_distinct_texts, require_finite
from clip_exp.evaluation.sets.class_names import class_prompts
from clip_exp.evaluation.sets.labeled import LabeledImages
from clip_exp.reports.classification_report import Classified
from clip_exp.reports.names import CERTAIN
from clip_exp.text.tokenizer import Tokenizes

SCALE = 100.0  # the published factor of the cosines: the upper bound of the logit scale
CHUNK = 8192  # images scored at a time: 33 MB of scores for 1,000 classes


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
    """The five best classes of each image (all, if they are fewer), best first, and their probabilities among all.

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


def best_classes(scores_NC: Tensor) -> Tensor:
    """[N, 5] (fewer for fewer classes), best first. Of equal scores `topk` picks, as in the published numbers."""
    return scores_NC.topk(min(5, scores_NC.shape[1]), dim=1).indices


def accuracies(best_NK: Tensor, labels_N: Tensor, num_classes: int) -> dict[str, float]:
    """Fractions over all images, each counted once: `top1`, `mean_per_class_recall`, and of more than five classes `top5`.

    Args:
        best_NK: `best_classes`.
        labels_N: the class of each image.
    """
    recall = mean_per_class_recall(best_NK[:, 0], labels_N, num_classes)
    return {**top_k(best_NK, labels_N, num_classes), "mean_per_class_recall": recall}


def accuracy(scores_NC: Tensor, labels_N: Tensor) -> dict[str, float]:
    """Fraction of rows whose label has the best score (`top1`), and of more than five classes one of the best five (`top5`)."""
    return top_k(best_classes(scores_NC), labels_N, scores_NC.shape[1])


def top_k(best_NK: Tensor, labels_N: Tensor, num_classes: int) -> dict[str, float]:
    """Return `top1`, and of more than five classes `top5`, from `best_classes`. Of fewer, `top5` would be 1 for any model."""
    hit_NK = best_NK == labels_N[:, None]
    top1 = {"top1": hit_NK[:, 0].double().mean().item()}
    return top1 if num_classes <= CERTAIN else {**top1, "top5": hit_NK.any(dim=1).double().mean().item()}


def mean_per_class_recall(predicted_N: Tensor, labels_N: Tensor, num_classes: int) -> float:
    """Accuracy within each class, averaged over the classes that have images."""
    count_C = torch.bincount(labels_N, minlength=num_classes)
    hits_C = torch.bincount(labels_N[predicted_N == labels_N], minlength=num_classes)
    present = count_C > 0
    return (hits_C[present].double() / count_C[present]).mean().item()


def classified(data: LabeledImages, encoded: EncodedImages, labels: Tensor, best: Tensor, shares: Tensor) -> Classified:
    """What pages show of a classification, zero-shot or learned.

    Args:
        best: int64 [N, K], best first.
        shares: [N, K] of the best ones: probabilities.
    """
    return Classified(
        data.images,
        encoded.kept.numpy(),
        labels.numpy(),
        best.numpy(),
        shares.float().numpy(),
        data.class_names,
        data.keys,
    )
