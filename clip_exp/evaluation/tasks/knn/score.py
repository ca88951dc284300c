"""Weighted k-nearest-neighbor classification of frozen features, as for DINO (Wu et al. 2018; Caron et al. 2021)."""

from collections.abc import Callable

import torch
from torch import Tensor

from clip_exp.evaluation.classification import CHUNK, accuracies, classified
from clip_exp.evaluation.evaluated_model import ComputeResult, EvaluatedModel, encode_train_and_test, protocol_of
from clip_exp.evaluation.tasks.knn import KNNTask
from clip_exp.progress import progress
from clip_exp.reports.evaluation import Result

TILE_ELEMENTS = 2**24  # scores computed at a time: 64 MB in float32
SHOWN = 5  # predicted classes per image


def nearest(
    query_MD: Tensor, train_ND: Tensor, k: int, advance: Callable[[int], None] = lambda done: None
) -> tuple[Tensor, Tensor]:
    """Return the k rows of `train_ND` with the highest dot products, and these products; ties are in the order of the rows.

    Products are computed in tiles of rows, so memory does not grow with M * N.

    Args:
        query_MD: features of the test images.
        train_ND: features of the training images.
        k: number of neighbors, at most N.
        advance: function called with the number of rows after each tile.

    Returns:
        Rows, int64 [M, k], and products, float32 [M, k], on the CPU, best first.
    """
    rows, products = [], []
    for tile in query_MD.split(max(1, TILE_ELEMENTS // len(train_ND))):
        scores = tile @ train_ND.T
        best = scores.topk(min(k + 1, len(train_ND)), dim=1)
        row, product = best.indices[:, :k], best.values[:, :k]
        if len(train_ND) > k:  # topk breaks ties for the last place arbitrarily
            tied = best.values[:, k - 1] == best.values[:, k]
            row[tied] = scores[tied].sort(dim=1, descending=True, stable=True).indices[:, :k]
        rows.append(row.cpu())
        products.append(product.cpu())
        advance(len(tile))
    return torch.cat(rows), torch.cat(products)


def vote(labels_MK: Tensor, cosines_MK: Tensor, num_classes: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the top five classes of each image (all, if there are fewer), best first, and their fractions of the votes.

    The vote of a neighbor has weight exp(cosine / temperature). Ties are in the order of the classes.

    Args:
        labels_MK: class of each neighbor.
        cosines_MK: cosine similarity of each neighbor.
        num_classes: number of classes.
        temperature: temperature of the weights.

    Returns:
        Classes, int64 [M, 5], and probabilities, float64 [M, 5]. Probability 0: no neighbor has this class.
    """
    best, probabilities = [], []
    for labels, cosines in zip(labels_MK.split(CHUNK), cosines_MK.double().split(CHUNK), strict=True):
        votes = torch.zeros(len(labels), num_classes, dtype=torch.float64)
        votes.scatter_add_(1, labels, (cosines / temperature).softmax(dim=1))
        ordered = votes.sort(dim=1, descending=True, stable=True)
        best.append(ordered.indices[:, :SHOWN])
        probabilities.append(ordered.values[:, :SHOWN])
    return torch.cat(best), torch.cat(probabilities)


def score_knn(task: KNNTask, model: EvaluatedModel) -> ComputeResult:
    """Return a function that computes the accuracies of k-NN on frozen features. A class without votes is never a hit in `top5`."""
    frozen = encode_train_and_test(task, model)

    def compute_result() -> Result:
        config, device, classes = task.config, model.options.device, len(task.test.class_names)
        k = min(config.k, len(frozen.train_labels))
        with progress(len(frozen.test_labels), f"{task.name}: neighbors") as advance:
            query, train = frozen.test.features.to(device), frozen.train.features.to(device)
            rows, cosines = nearest(query, train, k, advance)
        ordered, probabilities = vote(frozen.train_labels[rows], cosines, classes, config.temperature)
        best = ordered.where(probabilities > 0, -1)
        return Result(
            accuracies(best, frozen.test_labels, classes),
            {**protocol_of(task, frozen), "k": k, "temperature": config.temperature},
            classified(task.test, frozen.test, frozen.test_labels, best, probabilities),
        )

    return compute_result
