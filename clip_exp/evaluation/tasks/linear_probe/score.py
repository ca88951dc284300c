"""Linear probe (Radford et al. 2021, appendix A.3): logistic regression on frozen image features.

The paper fits the features before the last projection, CLIP's README those after it, both without normalization. Here the features
are the output of `encode_image`, of unit norm. A factor s on all features is equivalent to a factor s² on C, which the search covers.
Only the differences between the norms of images are lost.
"""

import json
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clip_exp.evaluation.classification import CHUNK, accuracies, best_classes, classified
from clip_exp.evaluation.evaluated_model import ComputeResult, EvaluatedModel, encode_train_and_test, protocol_of
from clip_exp.evaluation.tasks.linear_probe import ProbeTask, require_held_out_images
from clip_exp.progress import progress
from clip_exp.ranks.group import from_main
from clip_exp.reports.evaluation import Result, TensorFile

# The search of the paper, in powers of ten: its limits, first step and last step.
FARTHEST, FIRST_STEP, LAST_STEP = 6.0, 2.0, 1 / 8
FITS = 15  # largest number of fits of the search
SMALL = 2**30  # multiplications per iteration; with fewer, several threads are slower than one


@dataclass(frozen=True)
class Probe:
    """Fitted linear classifier; the softmax of its scores gives probabilities."""

    coefficients: Tensor  # float64 [C, D]
    intercept: Tensor  # float64 [C]
    iterations: int
    converged: bool

    def scores(self, features_ND: Tensor) -> Tensor:
        """Return the scores, float64 [N, C]."""
        return features_ND.double() @ self.coefficients.T + self.intercept


@dataclass(frozen=True)
class Choice:
    """Chosen value of C, and the results of all values that were tried."""

    c: float
    accuracy: dict[float, float]  # accuracy on the held-out images, by C
    unconverged: list[float]  # values of C whose fit reached the limit of iterations


def fit_probe(features_ND: Tensor, labels_N: Tensor, c: float, max_iter: int = 1000) -> Probe:
    """Fit `sklearn.linear_model.LogisticRegression(C=c, max_iter=max_iter)` in float64: L-BFGS from zero.

    float32 gives another result if the regularization is strong. So does starting from the fit of a neighboring C: it halves the
    time of a search, but the result would depend on the order of the fits.

    Args:
        features_ND: features of the training images.
        labels_N: classes from 0 to C - 1, each at least once; at least two classes.
        c: inverse strength of the regularization.
        max_iter: limit of iterations.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    small = features_ND.numel() * len(labels_N.unique()) < SMALL
    regression = LogisticRegression(C=c, max_iter=max_iter)
    with warnings.catch_warnings(record=True) as caught, threadpool_limits(1 if small else None):
        warnings.simplefilter("always", ConvergenceWarning)
        regression.fit(features_ND.double().numpy(), labels_N.numpy())
    unconverged = any(issubclass(warning.category, ConvergenceWarning) for warning in caught)
    coefficients, intercept = torch.from_numpy(regression.coef_), torch.from_numpy(regression.intercept_)
    if len(intercept) == 1:  # for two classes scikit-learn has one row: the second class against the first
        coefficients = torch.cat([torch.zeros_like(coefficients), coefficients])
        intercept = torch.cat([torch.zeros_like(intercept), intercept])
    return Probe(coefficients, intercept, int(regression.n_iter_.max()), not unconverged)


def choose_c(
    features_ND: Tensor,
    labels_N: Tensor,
    candidates: Sequence[float] | None = None,
    val_fraction: float = 0.2,
    seed: int = 0,
    max_iter: int = 1000,
    advance: Callable[[int], None] = lambda done: None,
) -> Choice:
    """Choose the C with the highest accuracy on held-out images, stratified by class; the smallest C on a tie.

    All ranks must call. Rank 0 fits and sends each result to the others, so that no collective waits longer than a fit.

    Args:
        features_ND: features of the training images.
        labels_N: classes of the training images.
        candidates: values to try; None: the search of the paper, which tries 1e-6, 1e-4, …, 1e6 and then both sides of the best
            value at half the distance, down to an eighth of a decade.
        val_fraction: fraction of the images to hold out.
        seed: seed of the random choice of held-out images.
        max_iter: limit of iterations of a fit.
        advance: function called with 1 after each fit.
    """
    from sklearn.model_selection import train_test_split

    rows = np.arange(len(labels_N))
    fitted, held_out = train_test_split(rows, test_size=val_fraction, stratify=labels_N.numpy(), random_state=seed)
    accuracy: dict[float, float] = {}
    unconverged: list[float] = []

    def best() -> float:
        return min(accuracy, key=lambda c: (-accuracy[c], c))

    def measure(c: float) -> tuple[float, bool]:
        probe = fit_probe(features_ND[fitted], labels_N[fitted], c, max_iter)
        correct_N = probe.scores(features_ND[held_out]).argmax(dim=1) == labels_N[held_out]
        return correct_N.double().mean().item(), probe.converged

    for c in search(best) if candidates is None else dict.fromkeys(candidates):
        accuracy[c], converged = from_main(partial(measure, c))
        unconverged += [] if converged else [c]
        advance(1)
    return Choice(best(), dict(sorted(accuracy.items())), sorted(unconverged))


def search(best: Callable[[], float]) -> Iterator[float]:
    """Yield the values of C to try, coarse to fine.

    Args:
        best: function that returns the best value so far.
    """
    step = FIRST_STEP
    for power in np.arange(-FARTHEST, FARTHEST + step, step):
        yield float(10.0**power)
    while step > LAST_STEP:
        step /= 2
        middle = math.log10(best())
        for power in (middle - step, middle + step):
            if abs(power) <= FARTHEST + LAST_STEP / 2:
                yield float(10.0 ** (round(power / LAST_STEP) * LAST_STEP))


def predict(probe: Probe, features_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Return the top five classes of each image, best first, and their probabilities among all classes.

    Returns:
        Classes, int64 [N, K], and probabilities, float64 [N, K].
    """
    best, probabilities = [], []
    for chunk in features_ND.split(CHUNK):
        scores = probe.scores(chunk)
        best.append(best_classes(scores))
        probabilities.append(scores.softmax(dim=1).gather(1, best[-1]))
    return torch.cat(best), torch.cat(probabilities)


def score_probe(task: ProbeTask, model: EvaluatedModel) -> ComputeResult:
    """Return a function that computes the accuracies of a linear probe on frozen features. Its weights become a file."""
    config, frozen = task.config, encode_train_and_test(task, model)
    train, labels = frozen.train.features, frozen.train_labels
    if config.c is not None and len(config.c) == 1:
        choice = Choice(config.c[0], {}, [])
    else:
        require_held_out_images(labels.tolist(), task.train.class_names, config, task.name)
        with progress(FITS if config.c is None else len(config.c), f"{task.name}: choosing C") as advance:
            choice = choose_c(train, labels, config.c, config.val_fraction, config.seed, config.max_iter, advance)

    def compute_result() -> Result:
        probe = fit_probe(train, labels, choice.c, config.max_iter)
        best, probabilities = predict(probe, frozen.test.features)
        protocol: dict[str, Any] = {
            **protocol_of(task, frozen),
            "classifier": f"scikit-learn {version('scikit-learn')} LogisticRegression, lbfgs, float64",
            "c": choice.c,
            "max_iter": config.max_iter,
            "iterations": probe.iterations,
            "converged": probe.converged,
        }
        if choice.accuracy:
            protocol["choice_of_c"] = {
                "val_fraction": config.val_fraction,
                "seed": config.seed,
                "accuracy": {f"{c:.4g}": round(accuracy, 6) for c, accuracy in choice.accuracy.items()},
                "not_converged": [f"{c:.4g}" for c in choice.unconverged],
            }
        # For features of unit norm, the class scores are `features @ coefficients.T + intercept`.
        tensors = {"coefficients": probe.coefficients.float().numpy(), "intercept": probe.intercept.float().numpy()}
        metadata = {
            "class_names": json.dumps(task.test.class_names, ensure_ascii=False),
            "keys": json.dumps(task.train.keys, ensure_ascii=False),
            "c": str(choice.c),
            "model": model.config.name,
            "weights_sha256": model.weights_sha256 or "",
        }
        return Result(
            accuracies(best, frozen.test_labels, len(task.test.class_names)),
            protocol,
            classified(task.test, frozen.test, frozen.test_labels, best, probabilities),
            {"probe": TensorFile(tensors, metadata)},
        )

    return compute_result
