"""What an evaluation needs, found and checked without torch: the model, the data of every task, and a folder for the results."""

from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from clip_exp.config.evaluation_schema import EvaluateConfig, SubjectConfig
from clip_exp.config.idle import idle_problems, typed_keys
from clip_exp.config.load import to_yaml
from clip_exp.config.model_schema import ModelConfig
from clip_exp.config.schema import Precision
from clip_exp.devices import parse_devices
from clip_exp.errors import ClipExpError, ConfigError, gravest
from clip_exp.evaluation.prepared import Task
from clip_exp.evaluation.tasks import prepare_tasks
from clip_exp.loading.source import ModelSource, check_source, find_source
from clip_exp.runs import RunRecord, create_run_folder, name_problems, write_text
from clip_exp.secrets import leaks


def check(config: EvaluateConfig, arguments: Iterable[str] | None = None) -> tuple[ModelSource, list[Task]]:
    """Find the model and the data of an evaluation, without torch. Weights are fetched last, when all else is right.

    Args:
        arguments: of the command line, whose keys must have an effect; None: that has been checked, and the weights have since
            filled in the model.

    Raises:
        ClipExpError: of the class of the gravest problem, with a line for every problem.
    """
    errors: list[ClipExpError] = [ConfigError(problem) for problem in problems_of(config)]
    errors += [ConfigError(problem) for problem in leaks(asdict(config))]
    typed = typed_keys(arguments or ())
    if arguments is not None:
        errors += [ConfigError(problem) for problem in idle_problems(config, typed)]
    if config.name is not None:
        errors += [ConfigError(problem) for problem in name_problems(config.name)]
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
        known = source or ModelSource(config.model or ModelConfig(), Path(str(config.pretrained)))
    except ClipExpError as error:
        errors.append(error)
    tasks, task_errors = prepare_tasks(config.task, config.output_dir, known, typed)
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


def open_folder(config: EvaluateConfig, source: ModelSource, arguments: list[str]) -> Path:
    """A new folder that says what is about to be evaluated: its `config.yaml` has the settled model and weights on this disk."""
    if source.told is not None:
        config = replace(config, model=source.model, pretrained=str(source.weights.absolute()))
    name = config.name or (source.run.name if source.run else source.model.name)
    folder = create_run_folder(config.output_dir, "evaluate", name)
    write_text(folder / "config.yaml", to_yaml(config))
    told: dict[str, Any] = {} if source.told is None else {"pretrained": source.told}
    RunRecord(folder).start(arguments, weights=str(source.weights.resolve()), **told)
    return folder
