"""Robustness to natural distribution shifts, compared with a supervised network (CLIP paper, figure 13)."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from clip_exp.evaluation.classification import CHUNK, best_classes, top_k_accuracies
from clip_exp.evaluation.evaluated_model import ComputeResult, EvaluatedModel, hash_of
from clip_exp.evaluation.features import EncodedImages, encode_images, require_finite
from clip_exp.evaluation.tasks.robustness import UNSHIFTED, RobustnessTask
from clip_exp.evaluation.tasks.robustness.supervised import load_supervised, restrict
from clip_exp.evaluation.tasks.zero_shot import ClassificationTask
from clip_exp.ranks.group import from_main
from clip_exp.reports.comparison_report import Compared
from clip_exp.reports.evaluation import Result

MEAN = "mean_of_shifted"


def score_robustness(task: RobustnessTask, model: EvaluatedModel) -> ComputeResult:
    """Return a function that computes `<set>/top1` and `mean_of_shifted/top1` of the model, and `<baseline>/…` of the baseline.

    A dataset is scored as soon as it is encoded, so that only the features of one are in memory.
    """
    config, baseline = task.config, None
    if config.baseline is not None:
        where = f"task.{task.name}"
        baseline = load_supervised(config.baseline, config.baseline_weights, where, model.options)
    classifiers = _classifiers(task.sets, model)
    own: dict[str, Result] = {}
    of_baseline: dict[str, float] = {}
    for name, of_set in task.sets.items():
        encoded = model.encode_images(of_set.name, of_set.data.images)
        own[name] = from_main(partial(_without_details, of_set, encoded, classifiers[name]))
        if baseline is not None:
            what = f"{of_set.name}: {baseline.name}"
            logits = encode_images(baseline.encoder, of_set.data.images, model.options, model.cache, what)
            of_baseline[name] = from_main(partial(_supervised, of_set, logits, baseline.name))

    def compute_result() -> Result:
        name_of_model, sets = model.config.name, list(own)
        protocols = {name: result.protocol for name, result in own.items()}
        top1 = {name_of_model: {name: result.metrics["top1"] for name, result in own.items()}}
        metrics = _with_mean(top1[name_of_model])
        if baseline is not None:
            top1[baseline.name] = of_baseline
            metrics |= {f"{baseline.name}/{name}": value for name, value in _with_mean(of_baseline).items()}
        protocol: dict[str, Any] = {
            **{key: sum(of_set[key] for of_set in protocols.values()) for key in ("images", "bad_images")},
            "mean_of": [name for name in own if name != UNSHIFTED],
            "baseline": None if baseline is None else baseline.about,
            "sets": protocols,
        }
        compared = Compared(sets, {name: [of[each] for each in sets] for name, of in top1.items()})
        return Result(metrics, protocol, compared)

    return compute_result


def _without_details(task: ClassificationTask, encoded: EncodedImages, classifier_CD: Tensor) -> Result:
    result = task.compute_result(encoded, classifier_CD)
    return Result(result.metrics, result.protocol)


def _supervised(task: ClassificationTask, encoded: EncodedImages, baseline: str) -> float:
    """Return the top-1 accuracy of logits of a network that was trained on ImageNet-1k."""
    data, classes = task.data, task.data.imagenet
    assert classes is not None  # `RobustnessTaskConfig.prepare`
    require_finite(encoded.features, f"logits of {baseline}")
    best = [best_classes(restrict(logits, classes)) for logits in encoded.features.split(CHUNK)]
    return top_k_accuracies(torch.cat(best), torch.tensor(data.labels)[encoded.kept], len(classes))["top1"]


def _classifiers(sets: dict[str, ClassificationTask], model: EvaluatedModel) -> dict[str, Tensor]:
    """Return the classifier [C, D] of each dataset. Each class name is embedded only once.

    The longest list of names is embedded first and completely, so that it has the cache entry of `task=imagenet`.
    """
    known: dict[tuple[str, str], Tensor] = {}
    for task in sorted(sets.values(), key=lambda task: -len(task.data.class_names)):
        prompts = hash_of(task.templates)
        if new := [name for name in task.data.class_names if (prompts, name) not in known]:
            classifier = model.classifier(new, task.templates)
            known |= {(prompts, name): row for name, row in zip(new, classifier, strict=True)}
    return {
        name: torch.stack([known[hash_of(task.templates), own] for own in task.data.class_names])
        for name, task in sets.items()
    }


def _with_mean(top1: dict[str, float]) -> dict[str, float]:
    shifted = [value for name, value in top1.items() if name != UNSHIFTED]
    mean = {f"{MEAN}/top1": sum(shifted) / len(shifted)} if shifted else {}
    return {**{f"{name}/top1": value for name, value in top1.items()}, **mean}
