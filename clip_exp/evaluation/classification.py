"""Zero-shot classification as published (Radford et al. 2021, section 3.1.4, and their notebook), and accuracies."""

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

SCALE = 100.0  # published factor of the cosine similarities: the upper bound of the logit scale
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
    """Return one embedding per class: the prompt embeddings are normalized, averaged, and normalized again.

    Runs in the precision of the weights, outside autocast. Classes with the same name have the same embedding and remain
    separate classes.

    Args:
        model: model with a text tower.
        tokenizer: tokenizer for the prompts.
        class_names: names of the C classes.
        templates: prompt templates with `{}` for the class name.
        batch_size: number of prompts encoded at a time.
        device: device of the model.
        what: name of the progress bar; None: no progress bar.
        shared: divide the work between the ranks, all of which must call.

    Returns:
        Embeddings [C, D], float32, unit norm, on `device`.
    """
    prompts = [prompt for name in class_names for prompt in class_prompts(name, list(templates))]
    features_PD, index = encode_distinct_texts(model, tokenizer, prompts, batch_size, device, what, shared)
    mean_CD = F.embedding_bag(index.view(len(class_names), len(templates)), features_PD, mode="mean")
    return F.normalize(mean_CD, dim=-1)


def class_scores(image_features_ND: Tensor, class_embeddings_CD: Tensor) -> Tensor:
    """Return scores [N, C]: 100 times the cosine similarity."""
    return SCALE * image_features_ND @ class_embeddings_CD.T


def classify(image_features_ND: Tensor, class_embeddings_CD: Tensor) -> tuple[Tensor, Tensor]:
    """Return the top five classes of each image, best first, and their probabilities among all classes.

    With fewer than five classes all are returned.

    Args:
        image_features_ND: image features of unit norm.
        class_embeddings_CD: output of `build_classifier`.

    Returns:
        Classes, int64 [N, K], and probabilities, float32 [N, K], on the CPU.

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
    """Return the top classes [N, min(5, C)], best first. `topk` breaks ties, as for the published numbers."""
    return scores_NC.topk(min(5, scores_NC.shape[1]), dim=1).indices


def accuracies(best_NK: Tensor, labels_N: Tensor, num_classes: int) -> dict[str, float]:
    """Return `top1`, `mean_per_class_recall` and, for more than five classes, `top5`, as fractions of the images.

    Args:
        best_NK: output of `best_classes`.
        labels_N: class of each image.
        num_classes: number of classes.
    """
    recall = mean_per_class_recall(best_NK[:, 0], labels_N, num_classes)
    return {**top_k_accuracies(best_NK, labels_N, num_classes), "mean_per_class_recall": recall}


def accuracy(scores_NC: Tensor, labels_N: Tensor) -> dict[str, float]:
    """Return `top1` and, for more than five classes, `top5`, as fractions of the rows."""
    return top_k_accuracies(best_classes(scores_NC), labels_N, scores_NC.shape[1])


def top_k_accuracies(best_NK: Tensor, labels_N: Tensor, num_classes: int) -> dict[str, float]:
    """Return `top1` and, for more than five classes, `top5`, from the output of `best_classes`.

    With five classes or fewer `top5` would be 1 for any model.
    """
    hit_NK = best_NK == labels_N[:, None]
    top1 = {"top1": hit_NK[:, 0].double().mean().item()}
    return top1 if num_classes <= CERTAIN else {**top1, "top5": hit_NK.any(dim=1).double().mean().item()}


def mean_per_class_recall(predicted_N: Tensor, labels_N: Tensor, num_classes: int) -> float:
    """Return the accuracy within each class, averaged over the classes that have images."""
    count_C = torch.bincount(labels_N, minlength=num_classes)
    hits_C = torch.bincount(labels_N[predicted_N == labels_N], minlength=num_classes)
    present = count_C > 0
    return (hits_C[present].double() / count_C[present]).mean().item()


def classified(
    data: LabeledImages, encoded: EncodedImages, labels: Tensor, best: Tensor, probabilities: Tensor
) -> Classified:
    """Return the predictions of a zero-shot or learned classification for its reports.

    Args:
        data: evaluated images.
        encoded: features of the images that could be read.
        labels: int64 [N], true classes.
        best: int64 [N, K], predicted classes, best first.
        probabilities: [N, K], probabilities of the predicted classes.
    """
    return Classified(
        data.images,
        encoded.kept.numpy(),
        labels.numpy(),
        best.numpy(),
        probabilities.float().numpy(),
        data.class_names,
        data.keys,
        encoded.limits,
    )
