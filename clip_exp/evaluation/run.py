"""An evaluation: find the model and the data, score every task, leave the results where people look for them."""

import logging
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from clip_exp import __version__
from clip_exp.config.schema import EvaluateConfig, Precision
from clip_exp.errors import ClipExpError, ConfigError
from clip_exp.evaluation.tasks import Task, prepare_tasks
from clip_exp.inference.sources import Source, find_source
from clip_exp.runs import RunRecord, evaluation_folder, write_json

log = logging.getLogger(__name__)


def evaluate(config: EvaluateConfig) -> dict[str, dict[str, Any]]:
    """Score a model on tasks.

    Everything that can be wrong with the paths and names is told before the model is loaded. Results are written as
    soon as a task is done: `eval/<task>.json` in this evaluation's folder, and in the run's where there is one.

    Returns:
        of each task `{"metrics": {name: value}, "protocol": {…}}`; shares are fractions.
    Raises:
        ConfigError, DataError, CheckpointError: the model, a task or its data cannot be used.
        NumericError: the model's features are not finite.
    """
    source, tasks = check(config)
    folder = evaluation_folder(config, config.name or (source.run.name if source.run else source.model.name))
    record = RunRecord(folder)
    record.start(sys.argv[1:], weights=str(source.weights.resolve()))
    results: dict[str, dict[str, Any]] = {}
    try:
        subject, about = _load(config, source)
        # Torch takes seconds to import: only once the configuration is known to be right.
        from clip_exp.evaluation.scoring import score

        for task in tasks:
            result = score(task, subject)
            result["protocol"] |= about
            _write(result, task.name, folder, source.run_dir)
            results[task.name] = result
    except BaseException:
        record.finish("failed", tasks=list(results))
        raise
    record.finish("finished", tasks=list(results))
    _show(results, folder)
    return results


def check(config: EvaluateConfig) -> tuple[Source, list[Task]]:
    """Find the model and the data of an evaluation, without torch.

    Raises:
        ClipExpError: of the class of the gravest problem, with a line for every problem.
    """
    errors: list[ClipExpError] = [ConfigError(problem) for problem in _problems(config)]
    source = None
    try:
        source = find_source(config)
    except ClipExpError as error:
        errors.append(error)
    tasks, task_errors = prepare_tasks(config, source)
    errors += task_errors
    if errors:
        gravest = min(errors, key=lambda error: error.exit_code)
        raise type(gravest)("\n".join(str(error) for error in errors))
    assert source is not None
    return source, tasks


def _problems(config: EvaluateConfig) -> list[str]:
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


def _load(config: EvaluateConfig, source: Source) -> tuple[Any, dict[str, Any]]:
    from clip_exp.evaluation.encode import EncodeOptions
    from clip_exp.evaluation.scoring import Subject
    from clip_exp.inference.loading import choose_device, choose_precision, load_model
    from clip_exp.text.tokenizer import Tokenizer

    device = choose_device(config.accelerator)
    options = EncodeOptions(
        device,
        choose_precision(config.precision, device),
        config.batch_size,
        config.num_workers,
        config.on_bad_image,
        config.max_image_pixels,
    )
    tokenizer = Tokenizer(source.model.text.context_length)
    about = {
        "model": source.model.name,
        "weights": str(source.weights.resolve()),
        "weights_sha256": source.sha256(),
        "step": source.step,
        "device": str(device),
        "clip_exp": __version__,
    }
    return Subject(load_model(source, device), tokenizer, source.model.image, options), about


def _write(result: dict[str, Any], task: str, folder: Path, run_dir: Path | None) -> None:
    for target in (folder, run_dir):
        if target is None:
            continue
        try:
            (target / "eval").mkdir(exist_ok=True)
            write_json(target / "eval" / f"{task}.json", result)
        except OSError as error:
            if target is folder:
                raise
            log.warning(
                "%s cannot be written (%s): the results are in %s only.", target / "eval", error.strerror, folder
            )


def _show(results: dict[str, dict[str, Any]], folder: Path) -> None:
    table = Table("metric", "value", "pictures", "left out")
    table.columns[1].justify = table.columns[2].justify = table.columns[3].justify = "right"
    for task, result in results.items():
        protocol = result["protocol"]
        left_out = protocol["bad_pictures"] + protocol.get("unlabeled_pictures", 0)
        for name, value in result["metrics"].items():
            shown = f"{value:.0f}" if "rank" in name else f"{value:.4f}"
            table.add_row(f"{task}/{name}", shown, str(protocol["pictures"]), str(left_out))
        if protocol.get("classes_without_pictures"):
            log.warning(
                "%s: %d of the %d classes have no pictures.",
                task,
                protocol["classes_without_pictures"],
                protocol["classes"],
            )
    console = Console()
    console.print(table)
    console.print(f"Results: {folder}", soft_wrap=True, highlight=False)
