"""An evaluation from its configuration to its results: all that it needs is found and checked without torch, then a folder, then processes work in it.

For one device there is no process but this one.
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

NAME = re.compile(r"[\w.@+-]+")  # of a task, which becomes a file's name
TIMEOUT_S = 7200  # of a collective: a rank waits this long for the slowest


def launch(config: EvaluateConfig, arguments: list[str]) -> int:
    """Check everything, open the evaluation's folder and evaluate in it; return the exit code.

    Args:
        arguments: of the command line, for `run.json`.
    """
    with exit_on_signals():
        return launch_work(Evaluation(config, arguments))[1]


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
    arguments = sys.argv[1:] if arguments is None else arguments
    source, tasks = check(config, arguments)
    folder = open_folder(config, source, arguments)
    return evaluate_in(folder, config, source, tasks)


class Evaluation(Work):
    """An evaluation, in a new folder."""

    def __init__(self, config: EvaluateConfig, arguments: list[str]) -> None:
        self.config = config
        self.arguments = arguments
        self.checked: tuple[ModelSource, list[Task]] | None = None  # of the process that opened the folder
        self.rank = evaluate_rank
        self.timeout_s = TIMEOUT_S

    @contextmanager
    def open(self) -> Iterator[Opened]:
        """Find the model and the data, see that there are the devices, and make the folder."""
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
    """Find the model and the data of an evaluation, without torch. Weights are fetched and fitted last, when all else is right.

    Args:
        arguments: of the command line, whose keys must have an effect; None: that has been checked, and the weights have since
            filled in the model.

    Raises:
        ClipExpError: of the class of the gravest problem, with a line for every problem.
    """
    found = [*leaks(plain(config)), *(name_problems(config.name) if config.name is not None else ())]
    if arguments is not None:
        found = [*problems(config, typed_keys(arguments)), *found]
    errors: list[ClipExpError] = [ConfigError(problem) for problem in found]
    try:
        parse_devices(config.accelerator, config.devices)
    except ConfigError as error:
        errors.append(error)
    source, wanted = None, config.task
    try:
        source = check_source(config)
    except ClipExpError as error:
        errors.append(error)
        # What a model that was not found validated on is not known.
        wanted = {name: task for name, task in wanted.items() if not task.of_validation}
    tasks: list[Task] = []
    if wanted or not config.task:
        run = source.run if source is not None else None  # weights that are yet to be fetched have no run
        tasks, task_errors = prepare_tasks(wanted, config.output_dir, run, fetch=not errors)
        errors += task_errors
    if errors:
        raise gravest(errors)
    source = source or find_source(config)
    if arguments is not None and source.description is not None:
        from clip_exp.weights.fit import check_weights  # imports torch

        check_weights(source.weights, source.model, source.prefix)
    return source, tasks


def _check_again(config: EvaluateConfig) -> tuple[ModelSource, list[Task]]:
    """Repeat `check` in a rank; its warnings were logged where it was first done, and from here on only rank 0 warns."""
    root = logging.getLogger()
    root.setLevel(logging.ERROR)
    checked = check(config)
    root.setLevel(logging.WARNING if is_first_rank() else logging.ERROR)
    return checked


def prepare_tasks(
    wanted: Mapping[str, TaskConfig], output_dir: str, run: TrainConfig | None, *, fetch: bool = True
) -> tuple[list[Task], list[ClipExpError]]:
    """Return everything that `task` of a configuration asks for, and everything that is wrong with it.

    Args:
        wanted: tasks by name.
        run: run of the model, which tells `auto` tasks what to score; None: the model is no run's.
        fetch: whether data may be downloaded where nothing else is wrong.
    """
    prepared: dict[str, list[Task]] = {}
    found: list[str] = []
    for name in wanted:
        if not NAME.fullmatch(name) or len(name.encode()) > MAX_NAME:
            found.append(
                f"task.{name}: a task's name becomes a file's name; use letters, digits, '_', '-', '.', {MAX_NAME} bytes at most."
            )
        elif task_of(name) != name:
            found.append(
                f"task.{name}: this name ends like those of a run's results of other checkpoints: rename your task."
            )
    if not wanted:
        found.append(f"no task: choose from task=[{','.join(options('task'))}].")
    errors: list[ClipExpError] = [ConfigError(problem) for problem in found]
    for name, task in sorted(wanted.items(), key=lambda item: item[1].fetches):
        if task.fetches and (errors or not fetch):
            continue  # what else is wrong is reported before hours of fetching
        try:
            prepared[name] = list(task.prepare(name, output_dir, run))
        except ClipExpError as error:
            errors.append(error)
    tasks = [task for name in wanted for task in prepared.get(name, [])]
    names = [task.name for task in tasks]
    twice = sorted({name for name in names if names.count(name) > 1})
    errors += [ConfigError(f"two tasks are called {name}: rename yours.") for name in twice]
    return tasks, errors


def open_folder(config: EvaluateConfig, source: ModelSource, arguments: list[str]) -> Path:
    """A new folder that says what is about to be evaluated: its `config.yaml` has the settled model and weights on this disk."""
    if source.description is not None:
        config = config.model_copy(update={"model": source.model, "pretrained": str(source.weights.absolute())})
    name = config.name or (source.run.name if source.run else source.model.name)
    folder = create_run_folder(config.output_dir, "evaluate", name)
    write_text(folder / "config.yaml", to_yaml(config))
    told: dict[str, Any] = {} if source.description is None else {"pretrained": source.description}
    RunRecord(folder).start(arguments, weights=str(source.weights.resolve()), **told)
    return folder


def evaluate_rank(folder: Path) -> int:
    """Evaluate what an evaluation folder's `config.yaml` describes, as one rank of several; return the exit code."""
    from clip_exp.ranks import group  # imports torch

    config = read_evaluate_config(folder)
    # The launcher ends this process when the work is done: the group needs no orderly end.
    group.start(resolve_accelerator(config.accelerator), TIMEOUT_S)
    return _evaluate(folder, config, *_check_again(config))


def _evaluate(folder: Path, config: EvaluateConfig, source: ModelSource, tasks: list[Task]) -> int:
    """Evaluate, and say how to continue where a signal stopped it; return the exit code."""
    try:
        evaluate_in(folder, config, source, tasks)
    except Stopped as stopped:
        if is_first_rank():
            how = (
                "goes on from the features that are kept"
                if config.cache_gb
                else "starts over, since cache_gb=0 keeps nothing"
            )
            print(f"{stopped} The same command {how}.", file=sys.stderr, flush=True)
        return PREEMPTED_EXIT_CODE
    return 0


def evaluate_in(
    folder: Path, config: EvaluateConfig, source: ModelSource, tasks: list[Task]
) -> dict[str, dict[str, Any]]:
    """Score tasks together with the other ranks, if there are any; rank 0 writes and shows.

    Raises:
        Stopped: a signal asked for it; what was encoded is kept, and the same command goes on from there.
        ClipExpError: see `evaluate`.
    """
    record, main = RunRecord(folder), is_first_rank()
    results: dict[str, dict[str, Any]] = {}
    with stop_on_signals():
        try:
            # Torch takes seconds to import: only once the configuration is known to be right.
            from clip_exp.evaluation.subject import score_tasks

            score_tasks(folder, config, source, tasks, results)
        except BaseException as failed:
            error: BaseException = failed
            if is_out_of_memory(failed):
                error = DeviceMemoryError(
                    f"out of memory while encoding with batch_size={config.batch_size}: lower batch_size. {str(failed).splitlines()[0]}"
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
