"""Launch of evaluations: check the configuration and the data without torch, create the folder, start the processes.

An evaluation on one device runs in this process.
"""

import logging
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clip_exp.config.base import plain, problems, typed_keys
from clip_exp.config.evaluation import EvaluateConfig, TaskConfig
from clip_exp.config.files import options, read_evaluate_config, to_yaml
from clip_exp.config.training import TrainConfig
from clip_exp.devices import Devices, is_out_of_memory, parse_devices, resolve_accelerator
from clip_exp.errors import PREEMPTED_EXIT_CODE, ClipExpError, ConfigError, DeviceMemoryError, gravest
from clip_exp.evaluation.task import Task
from clip_exp.loading import ModelSource, check_source, find_source
from clip_exp.ranks.environment import device_problems, is_first_rank
from clip_exp.ranks.failure import Stopped, exit_on_signals, stop_on_signals
from clip_exp.ranks.launch import Opened, Work, launch_work
from clip_exp.reports.evaluation import show
from clip_exp.reports.names import task_of
from clip_exp.runs import MAX_NAME, RunRecord, create_run_folder, name_problems, write_text
from clip_exp.secrets import leaks

NAME = re.compile(r"[\w.@+-]+")  # valid name of a task, which is used as a file name
TIMEOUT_S = 7200  # longest time that a rank waits for the others in a collective


def launch(config: EvaluateConfig, arguments: list[str]) -> int:
    """Check the configuration, create the folder of the evaluation, and evaluate; return the exit code.

    Args:
        config: configuration of the evaluation.
        arguments: command line arguments for `run.json`.
    """
    with exit_on_signals():
        return launch_work(Evaluation(config, arguments))[1]


def evaluate(config: EvaluateConfig, arguments: list[str] | None = None) -> dict[str, dict[str, Any]]:
    """Score a model on tasks in this process, with results in a new folder.

    Paths and names are checked before the model is loaded. The files of a task, `eval/<task>.json` and its reports, are written
    as soon as it is scored: in the folder of the evaluation, and in that of the run if the model is from one.

    Args:
        config: configuration of the evaluation.
        arguments: command line arguments for `run.json`; None: those of this process.

    Returns:
        `{"metrics": {name: value}, "protocol": {…}}` by task. Accuracies and recalls are fractions.

    Raises:
        ConfigError, DataError, CheckpointError: the model, a task or its data cannot be used.
        NumericError: features are not finite.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    source, tasks = check(config, arguments)
    folder = open_folder(config, source, arguments)
    return evaluate_in(folder, config, source, tasks)


class Evaluation(Work):
    """Evaluation in a new folder."""

    def __init__(self, config: EvaluateConfig, arguments: list[str]) -> None:
        self.config = config
        self.arguments = arguments
        self.checked: tuple[ModelSource, list[Task]] | None = None  # only in the process that created the folder
        self.rank = evaluate_rank
        self.timeout_s = TIMEOUT_S

    @contextmanager
    def open(self) -> Iterator[Opened]:
        """Find the model and the data, check the devices, and create the folder."""
        self.checked = source, _ = check(self.config, self.arguments)
        if problems := list(device_problems(self.devices())):
            raise ConfigError("\n".join(problems))
        yield Opened(open_folder(self.config, source, self.arguments))

    def devices(self) -> Devices:
        return parse_devices(self.config.accelerator, self.config.devices)

    def device_type(self) -> str:
        return resolve_accelerator(self.config.accelerator)

    def run(self, folder: Path) -> int:
        source, tasks = self.checked or _check_again(self.config)
        return _evaluate(folder, self.config, source, tasks)

    def note(self, folder: Path, status: str, **facts: Any) -> None:
        RunRecord(folder).finish(status, **facts)


def check(config: EvaluateConfig, arguments: Iterable[str] | None = None) -> tuple[ModelSource, list[Task]]:
    """Find and check the model and the data of an evaluation, without torch. Weights are downloaded last, if all else is valid.

    Args:
        config: configuration of the evaluation.
        arguments: command line arguments, whose keys must have an effect; None: they have been checked already.

    Returns:
        Source of the model, and the prepared tasks.

    Raises:
        ClipExpError: error with a line for every problem, of the class of the most severe one.
    """
    found = [*leaks(plain(config)), *(name_problems(config.name) if config.name is not None else ())]
    if arguments is not None:
        found = [*problems(config, typed_keys(arguments)), *found]
    errors: list[ClipExpError] = [ConfigError(problem) for problem in found]
    try:
        parse_devices(config.accelerator, config.devices)
    except ConfigError as error:
        errors.append(error)
    source, requested = None, config.task
    try:
        source = check_source(config)
    except ClipExpError as error:
        errors.append(error)
        # Without the model the data that it was validated on are unknown.
        requested = {name: task for name, task in requested.items() if not task.of_validation}
    tasks: list[Task] = []
    if requested or not config.task:
        run = source.run if source is not None else None  # weights that are not downloaded yet are not from a run
        tasks, task_errors = prepare_tasks(requested, config.output_dir, run, fetch=not errors)
        errors += task_errors
    if errors:
        raise gravest(errors)
    source = source or find_source(config)
    if arguments is not None and source.description is not None:
        from clip_exp.weights.fit import check_weights  # imports torch

        check_weights(source.weights, source.model, source.prefix)
    return source, tasks


def _check_again(config: EvaluateConfig) -> tuple[ModelSource, list[Task]]:
    """Repeat `check` in a rank, without the warnings that the first process has logged; then only rank 0 logs warnings."""
    root = logging.getLogger()
    root.setLevel(logging.ERROR)
    checked = check(config)
    root.setLevel(logging.WARNING if is_first_rank() else logging.ERROR)
    return checked


def prepare_tasks(
    requested: Mapping[str, TaskConfig], output_dir: str, run: TrainConfig | None, *, fetch: bool = True
) -> tuple[list[Task], list[ClipExpError]]:
    """Prepare the tasks of a configuration; return them and the errors of those that cannot be prepared.

    Args:
        requested: configurations of the tasks by name.
        output_dir: folder for generated data.
        run: run of the model, whose validation data `auto` tasks use; None: the model is not from a run.
        fetch: allow downloads of data if there are no errors.
    """
    prepared: dict[str, list[Task]] = {}
    found: list[str] = []
    for name in requested:
        if not NAME.fullmatch(name) or len(name.encode()) > MAX_NAME:
            found.append(
                f"task.{name}: the name of a task is used as a file name: use letters, digits, '_', '-', '.', at most {MAX_NAME} bytes."
            )
        elif task_of(name) != name:
            found.append(
                f"task.{name}: the end of this name is reserved for results of other checkpoints: rename the task."
            )
    if not requested:
        found.append(f"task is empty: choose from task=[{','.join(options('task'))}].")
    errors: list[ClipExpError] = [ConfigError(problem) for problem in found]
    for name, task in sorted(requested.items(), key=lambda item: item[1].fetches):
        if task.fetches and (errors or not fetch):
            continue  # other errors are reported before hours of downloads
        try:
            prepared[name] = list(task.prepare(name, output_dir, run))
        except ClipExpError as error:
            errors.append(error)
    tasks = [task for name in requested for task in prepared.get(name, [])]
    names = [task.name for task in tasks]
    twice = sorted({name for name in names if names.count(name) > 1})
    errors += [ConfigError(f"two tasks have the name {name}: rename one.") for name in twice]
    return tasks, errors


def open_folder(config: EvaluateConfig, source: ModelSource, arguments: list[str]) -> Path:
    """Create and return the folder of an evaluation. Its `config.yaml` has the resolved model or run, and local weights."""
    if source.description is not None:
        config = config.model_copy(update={"model": source.model, "pretrained": str(source.weights.absolute())})
    if config.run is not None:  # which may be a name, or latest
        config = config.model_copy(update={"run": str(source.run_dir)})
    name = config.name or (source.run.name if source.run else source.model.name)
    folder = create_run_folder(config.output_dir, "evaluate", name)
    write_text(folder / "config.yaml", to_yaml(config))
    pretrained: dict[str, Any] = {} if source.description is None else {"pretrained": source.description}
    RunRecord(folder).start(arguments, weights=str(source.weights.resolve()), **pretrained)
    return folder


def evaluate_rank(folder: Path) -> int:
    """Run the evaluation of `config.yaml` in its folder as one of several ranks; return the exit code."""
    from clip_exp.ranks import group  # imports torch

    config = read_evaluate_config(folder)
    # The launcher ends this process, so the process group is not destroyed here.
    group.start(resolve_accelerator(config.accelerator), TIMEOUT_S)
    return _evaluate(folder, config, *_check_again(config))


def _evaluate(folder: Path, config: EvaluateConfig, source: ModelSource, tasks: list[Task]) -> int:
    """Evaluate, and print how to resume after a signal; return the exit code."""
    try:
        evaluate_in(folder, config, source, tasks)
    except Stopped as stopped:
        if is_first_rank():
            how = (
                "resumes from the cached features"
                if config.cache_gb
                else "starts over, since cache_gb=0 disables the cache"
            )
            print(f"{stopped} The same command {how}.", file=sys.stderr, flush=True)
        return PREEMPTED_EXIT_CODE
    return 0


def evaluate_in(
    folder: Path, config: EvaluateConfig, source: ModelSource, tasks: list[Task]
) -> dict[str, dict[str, Any]]:
    """Score tasks together with the other ranks, if there are any. Rank 0 writes and prints the results.

    Raises:
        Stopped: a signal stopped the evaluation; the same command resumes from the cached features.
        ClipExpError: see `evaluate`.
    """
    record, main = RunRecord(folder), is_first_rank()
    results: dict[str, dict[str, Any]] = {}
    with stop_on_signals():
        try:
            # Torch takes seconds to import, so it is imported only after the checks.
            from clip_exp.evaluation.evaluated_model import score_tasks

            score_tasks(folder, config, source, tasks, results)
        except BaseException as failed:
            error: BaseException = failed
            if is_out_of_memory(failed):
                error = DeviceMemoryError(
                    f"out of memory while encoding with batch_size={config.batch_size}: reduce batch_size. {str(failed).splitlines()[0]}"
                )
            if main:
                code = PREEMPTED_EXIT_CODE if isinstance(error, Stopped) else getattr(error, "exit_code", 1)
                status = "preempted" if isinstance(error, Stopped) else "failed"
                record.finish(status, tasks=list(results), error=str(error).splitlines()[:20], exit_code=code)
            if error is failed:
                raise
            raise error from failed
        if main:
            record.finish("finished", tasks=list(results))
            show(results, folder)
    return results
