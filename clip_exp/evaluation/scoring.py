"""From prepared tasks and a model to results. Every rank encodes a share; rank 0 scores the whole."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from clip_exp._version import __version__
from clip_exp.config.evaluation import EvaluateConfig
from clip_exp.devices import exact_float32
from clip_exp.evaluation.features import Cache, encode_options
from clip_exp.evaluation.subject import Subject
from clip_exp.evaluation.task import Task
from clip_exp.loading.model import load_model
from clip_exp.loading.source import ModelSource
from clip_exp.ranks.group import from_main, is_main
from clip_exp.reports.evaluation import Result, write_result
from clip_exp.reports.names import name_in_run
from clip_exp.text.tokenizer import build_tokenizer


def score_tasks(
    folder: Path, config: EvaluateConfig, source: ModelSource, tasks: list[Task], results: dict[str, dict[str, Any]]
) -> None:
    """Score one task after the other into `results`; what one of them found is written before the next begins."""
    subject, about = _load_subject(config, source)
    for task in tasks:
        result = score(task, subject)
        result.protocol.update(about)
        if is_main():
            # A mixture's scores are not the run's.
            run_dir = None if source.mix else source.run_dir
            write_result(result, task.name, folder, run_dir, name_in_run(task.name, source))
        results[task.name] = {"metrics": result.metrics, "protocol": result.protocol}
    if subject.cache is not None and is_main():
        subject.cache.prune()


def _load_subject(config: EvaluateConfig, source: ModelSource) -> tuple[Subject, dict[str, Any]]:
    options = encode_options(config)
    sha256 = from_main(source.sha256)
    about = about_weights(source, sha256, options.device)
    cache = Cache(Path(config.output_dir) / "cache", config.cache_gb) if config.cache_gb else None
    model = load_model(source, options.device)
    tokenizer = build_tokenizer(source.model.text)
    return Subject(model, tokenizer, source.model, options, sha256, cache), about


def about_weights(source: ModelSource, sha256: str, device: torch.device) -> dict[str, Any]:
    """For a protocol: which weights were scored, on which kind of device."""
    return {
        "model": source.model.name,
        "weights": str(source.weights.resolve()),
        "weights_sha256": sha256,
        **({} if source.told is None else {"pretrained": source.told}),
        **({} if source.mix is None else {"wise_ft": asdict(source.mix)}),
        "step": source.step,
        **({} if source.run_dir is None else {"ema": source.ema}),
        "device": device.type,
        "clip_exp": __version__,
    }


@exact_float32()  # scores too: towers see to it themselves
def score(task: Task, subject: Subject) -> Result:
    """Return the result of one task. Every rank calls and gets it; only rank 0's has details and files.

    Raises:
        DataError: a picture cannot be read and `on_bad_image` is `error`, or none can be read.
        NumericError: features are not finite.
    """
    truncated = subject.tokenizer.truncated
    judge = task.score(subject)
    here: list[Result] = []

    def judged() -> Result:
        here.append(judge())
        return replace(here[0], details=None, files={})

    result = from_main(judged)
    common = {
        "truncated_texts": subject.tokenizer.truncated - truncated,
        "preprocessing": subject.preprocessing(),
        "precision": subject.options.precision,
        "kind": task.config.kind,
    }
    return replace(here[0] if here else result, protocol={**common, **result.protocol})
