"""From `task` of a configuration to what is to be scored: files found, names matched, no weights loaded. No torch."""

import re
from collections.abc import Mapping

from clip_exp.config.evaluation import TaskConfig
from clip_exp.config.files import options
from clip_exp.config.training import TrainConfig
from clip_exp.errors import ClipExpError, ConfigError
from clip_exp.evaluation.task import Task
from clip_exp.reports.names import task_of
from clip_exp.runs import MAX_NAME

NAME = re.compile(r"[\w.@+-]+")  # becomes a file's name


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
    errors: list[ClipExpError] = []
    for name in wanted:
        if not NAME.fullmatch(name) or len(name.encode()) > MAX_NAME:
            errors.append(
                ConfigError(
                    f"task.{name}: a task's name becomes a file's name; use letters, digits, '_', '-', '.', {MAX_NAME} bytes at most."
                )
            )
        elif task_of(name) != name:
            errors.append(
                ConfigError(
                    f"task.{name}: this name ends like those of a run's results of other checkpoints: rename your task."
                )
            )
    if not wanted:
        errors.append(ConfigError(f"no task: choose from task=[{','.join(options('task'))}]."))
    for name, task in sorted(wanted.items(), key=lambda item: item[1].fetches):
        if task.fetches and (errors or not fetch):
            continue  # what else is wrong is reported before hours of fetching
        try:
            prepared[name] = list(task.prepare(name, output_dir, run))
        except ClipExpError as error:
            errors.append(error)
    tasks = [task for name in wanted for task in prepared.get(name, [])]
    names = [task.name for task in tasks]
    errors += [
        ConfigError(f"two tasks are called {name}: rename yours.")
        for name in sorted(set(names))
        if names.count(name) > 1
    ]
    return tasks, errors
