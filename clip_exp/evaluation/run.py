"""An evaluation in one process (a rank of several, or the only one): score every task, leave the results where people look."""

import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from clip_exp import __version__
from clip_exp.config.evaluation_schema import EvaluateConfig, SubjectConfig
from clip_exp.config.model_schema import ModelConfig
from clip_exp.config.schema import Precision
from clip_exp.devices import parse_devices
from clip_exp.errors import PREEMPTED_EXIT_CODE, ClipExpError, ConfigError, gravest
from clip_exp.evaluation.tasks import Task, prepare_tasks
from clip_exp.inference.sources import Source, check_source, find_source
from clip_exp.ranks.signals import Stopped, stop_on_signals
from clip_exp.runs import RunRecord, evaluation_folder


def evaluate(config: EvaluateConfig, arguments: list[str] | None = None) -> dict[str, dict[str, Any]]:
    """Score a model on tasks, in a new folder, in this process alone.

    Everything that can be wrong with the paths and names is told before the model is loaded. Results are written as
    soon as a task is done: `eval/<task>.json` and its pages in this evaluation's folder, and in the run's where there is one.

    Args:
        arguments: of the command line, for `run.json`.
    Returns:
        of each task `{"metrics": {name: value}, "protocol": {…}}`; shares are fractions.
    Raises:
        ConfigError, DataError, CheckpointError: the model, a task or its data cannot be used.
        NumericError: the model's features are not finite.
    """
    source, tasks = check(config)
    folder = open_folder(config, source, sys.argv[1:] if arguments is None else arguments)
    return evaluate_in(folder, config, source, tasks)


def check(config: EvaluateConfig) -> tuple[Source, list[Task]]:
    """Find the model and the data of an evaluation, without torch. Weights are fetched last, when all else is right.

    Raises:
        ClipExpError: of the class of the gravest problem, with a line for every problem.
    """
    errors: list[ClipExpError] = [ConfigError(problem) for problem in problems_of(config)]
    if config.cache_gb < 0:
        errors.append(ConfigError(f"cache_gb={config.cache_gb} must not be negative; 0 keeps nothing."))
    try:
        parse_devices(config.accelerator, config.devices)
    except ConfigError as error:
        errors.append(error)
    known, source = None, None
    try:
        source = check_source(config)
        # Tasks ask for the model's run alone, which weights that are yet to be fetched do not have.
        known = source or Source(config.model or ModelConfig(), Path(str(config.pretrained)))
    except ClipExpError as error:
        errors.append(error)
    tasks, task_errors = prepare_tasks(config.task, config.output_dir, known)
    errors += task_errors
    if errors:
        raise gravest(errors)
    return source or find_source(config), tasks


def problems_of(config: SubjectConfig) -> list[str]:
    """What is wrong with the keys that every command that uses a model has."""
    problems = []
    if config.precision not in list(Precision):
        problems.append(f"precision={config.precision} must be one of {', '.join(Precision)}.")
    if config.batch_size < 1:
        problems.append(f"batch_size={config.batch_size} must be above 0.")
    if config.num_workers is not None and config.num_workers < 0:
        problems.append(f"num_workers={config.num_workers} must not be negative.")
    if config.max_image_pixels < 1:
        problems.append(f"max_image_pixels={config.max_image_pixels} must be above 0.")
    return problems


def open_folder(config: EvaluateConfig, source: Source, arguments: list[str]) -> Path:
    """A new folder that says what is about to be evaluated: its `config.yaml` has the settled model and weights on this disk."""
    if source.told is not None:
        config = replace(config, model=source.model, pretrained=str(source.weights.absolute()))
    folder = evaluation_folder(config, config.name or (source.run.name if source.run else source.model.name))
    told = {} if source.told is None else {"pretrained": source.told}
    RunRecord(folder).start(arguments, weights=str(source.weights.resolve()), **told)
    return folder


def evaluate_in(folder: Path, config: EvaluateConfig, source: Source, tasks: list[Task]) -> dict[str, dict[str, Any]]:
    """Score tasks together with the other ranks, if there are any; rank 0 writes and shows.

    Raises:
        Stopped: a signal asked for it; what was encoded is kept, and the same command goes on from there.
        ClipExpError: see `evaluate`.
    """
    record, main = RunRecord(folder), os.environ.get("RANK", "0") == "0"
    results: dict[str, dict[str, Any]] = {}
    with stop_on_signals():
        try:
            _score_tasks(folder, config, source, tasks, results)
        except BaseException as error:
            if main:
                code = PREEMPTED_EXIT_CODE if isinstance(error, Stopped) else getattr(error, "exit_code", 1)
                status = "preempted" if isinstance(error, Stopped) else "failed"
                record.finish(status, tasks=list(results), error=str(error).splitlines()[:20], exit_code=code)
            raise
        if main:
            from clip_exp.reports.evaluation import show

            record.finish("finished", tasks=list(results))
            show(results, folder)
    return results


def _score_tasks(
    folder: Path, config: EvaluateConfig, source: Source, tasks: list[Task], results: dict[str, dict[str, Any]]
) -> None:
    """Score one task after the other into `results`; what one of them found is written before the next begins."""
    # Torch takes seconds to import: only once the configuration is known to be right.
    from clip_exp.evaluation.scoring import score
    from clip_exp.ranks.group import is_main
    from clip_exp.reports.evaluation import write_result

    subject, about = _load(config, source)
    for task in tasks:
        result = score(task, subject)
        result.protocol.update(about)
        if is_main():
            # A mixture's scores are not the run's.
            write_result(result, task.name, folder, None if source.mix else source.run_dir)
        results[task.name] = {"metrics": result.metrics, "protocol": result.protocol}
    if subject.cache is not None and is_main():
        subject.cache.prune()


def _load(config: EvaluateConfig, source: Source) -> tuple[Any, dict[str, Any]]:
    from clip_exp.evaluation.cache import Cache
    from clip_exp.evaluation.encode import encode_options
    from clip_exp.evaluation.scoring import Subject
    from clip_exp.inference.loading import load_model
    from clip_exp.ranks.group import from_main
    from clip_exp.text.build import build_tokenizer

    options = encode_options(config)
    sha256 = from_main(source.sha256)
    about = about_weights(source, sha256, options.device)
    cache = Cache(Path(config.output_dir) / "cache", config.cache_gb) if config.cache_gb else None
    model = load_model(source, options.device)
    tokenizer = build_tokenizer(source.model.text)
    return Subject(model, tokenizer, source.model, options, sha256, cache), about


def about_weights(source: Source, sha256: str, device: Any) -> dict[str, Any]:
    """For a protocol: which weights were scored, on which kind of device."""
    return {
        "model": source.model.name,
        "weights": str(source.weights.resolve()),
        "weights_sha256": sha256,
        **({} if source.told is None else {"pretrained": source.told}),
        **({} if source.mix is None else {"wise_ft": asdict(source.mix)}),
        "step": source.step,
        "device": device.type,
        "clip_exp": __version__,
    }
