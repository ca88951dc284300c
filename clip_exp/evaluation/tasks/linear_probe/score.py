"""Linear probe (Radford et al. 2021, appendix A.3): logistic regression on frozen image features.

The paper fits the features before the last projection, CLIP's README those after it, neither of unit norm. Here they are
what `encode_image` returns, of unit norm, and are fitted as they are: a factor s on every feature would be a factor s² on C,
which the search covers. Only how the norms of images differ is lost.
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
from clip_exp.evaluation.tasks.linear_probe import ProbeTask, require_division
from clip_exp.progress import progress
from clip_exp.ranks.group import from_main
from clip_exp.reports.evaluation import Result, TensorFile

# The paper's search, in powers of ten: its ends, its first step, and the last one.
FARTHEST, FIRST_STEP, LAST_STEP = 6.0, 2.0, 1 / 8
FITS = 15  # the most that the search takes
SMALL = 2**30  # multiplications per iteration below which threads of the linear algebra wait more than they work


@dataclass(frozen=True)
class Probe:
    """A fitted linear classifier: the softmax of its scores are probabilities."""

    coefficients: Tensor  # float64 [C, D]
    intercept: Tensor  # float64 [C]
    iterations: int
    converged: bool

    def scores(self, features_ND: Tensor) -> Tensor:
        """float64 [N, C]."""
        return features_ND.double() @ self.coefficients.T + self.intercept


@dataclass(frozen=True)
class Choice:
    """The strength of the regularisation that was chosen, and what from."""

    c: float
    accuracy: dict[float, float]  # of each C that was tried: share of the held-out images that are right
    unconverged: list[float]  # each C whose fit reached the limit of iterations


def fit_probe(features_ND: Tensor, labels_N: Tensor, c: float, max_iter: int = 1000) -> Probe:
    """`sklearn.linear_model.LogisticRegression(C=c, max_iter=max_iter)` in float64: L-BFGS from zero.

    float32 stops at another place where the regularisation is strong. So does a start from a neighbouring C: it halves
    the time of a search, but the result would depend on the order of the fits.

    Args:
        labels_N: 0 to C - 1, each at least once; at least two classes.
        c: inverse strength of the regularisation.
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
    if len(intercept) == 1:  # of two classes, scikit-learn has the second one's lead over the first
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
    """The C whose fit is right most often on a held-out share, stratified by class; of several the smallest.

    Every rank calls. Rank 0 fits, and tells the others after each fit, so that none waits longer than that for a word.

    Args:
        candidates: all are tried; None: the paper's search, which tries 1e-6, 1e-4, …, 1e6 and then both sides of the best
            at half the distance, until it is an eighth of a decade.
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
        right_N = probe.scores(features_ND[held_out]).argmax(dim=1) == labels_N[held_out]
        return right_N.double().mean().item(), probe.converged

    for c in search(best) if candidates is None else dict.fromkeys(candidates):
        accuracy[c], converged = from_main(partial(measure, c))
        unconverged += [] if converged else [c]
        advance(1)
    return Choice(best(), dict(sorted(accuracy.items())), sorted(unconverged))


def search(best: Callable[[], float]) -> Iterator[float]:
    """What to try, coarse to fine; `best` is asked for the best so far."""
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
    """The five best classes of each image (all, if they are fewer), best first, and their probabilities among all.

    Returns:
        int64 [N, K] and float64 [N, K].
    """
    best, probabilities = [], []
    for chunk in features_ND.split(CHUNK):
        scores = probe.scores(chunk)
        best.append(best_classes(scores))
        probabilities.append(scores.softmax(dim=1).gather(1, best[-1]))
    return torch.cat(best), torch.cat(probabilities)


def score_probe(task: ProbeTask, model: EvaluatedModel) -> ComputeResult:
    """Return what scores a linear probe on frozen features: see `classification.accuracies`. Its weights become a file."""
    config, frozen = task.config, encode_train_and_test(task, model)
    train, labels = frozen.train.features, frozen.train_labels
    if config.c is not None and len(config.c) == 1:
        choice = Choice(config.c[0], {}, [])
    else:
        require_division(labels.tolist(), task.train.class_names, config, task.name)
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
                "accuracy": {f"{c:.4g}": round(share, 6) for c, share in choice.accuracy.items()},
                "not_converged": [f"{c:.4g}" for c in choice.unconverged],
            }
        # For features of unit norm: `features @ coefficients.T + intercept` are the scores of the classes.
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
