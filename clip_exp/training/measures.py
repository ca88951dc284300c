"""What a run is measured by while it trains: its tasks, found before anything is loaded, and the metric that it watches. No torch."""

from collections.abc import Iterator

from clip_exp.config.base import nearest
from clip_exp.config.training import TrainConfig
from clip_exp.errors import ClipExpError, ConfigError, gravest
from clip_exp.evaluation.launch import prepare_tasks
from clip_exp.evaluation.task import Task
from clip_exp.reports.names import CERTAIN, VALIDATION, better

OF_VALIDATION = [f"val/{name}" for name in VALIDATION]


def training_tasks(config: TrainConfig) -> list[Task]:
    """Return the tasks of a run, ready to be scored; raise the gravest of their problems, with a line for every problem."""
    tasks, errors = _find_tasks(config, fetch=True)
    if errors:
        raise gravest(errors)
    return tasks


def check_measures(config: TrainConfig, *, fetch: bool = False) -> list[ClipExpError]:
    """Return what is wrong with a run's tasks, which download data only where `fetch` is set and nothing else is wrong, and its `monitor`."""
    tasks, errors = _find_tasks(config, fetch=fetch)
    lost = {*config.task} - {task.name for task in tasks}
    if config.monitor is not None and config.monitor.partition("/")[0] not in lost:
        errors += map(ConfigError, _check_monitor(config, config.monitor, tasks))
    return errors


def check_validation_classes(config: TrainConfig, classes: int) -> Iterator[str]:
    """Yield what is wrong with `monitor`, which is known when the classes of the validation data were counted."""
    if config.monitor == "val/zeroshot_top5" and classes <= CERTAIN:
        yield _top5_problem(config.monitor, classes)


def is_of_task(monitor: str | None) -> bool:
    """Whether a metric is a task's, not validation's."""
    return monitor is not None and not monitor.startswith("val/")


def monitor_mode(monitor: str | None, mode: str) -> str:
    """Return `min` or `max`: which values of `monitor` are better, by `mode` or, where that is `auto`, by the metric itself."""
    return better(monitor or "") if mode == "auto" else mode


def _top5_problem(monitor: str, classes: int) -> str:
    return (
        f"monitor={monitor} is not measured: of {classes} classes the right one is always among the best five. Use "
        f"monitor={monitor.removesuffix('top5')}top1."
    )


def _find_tasks(config: TrainConfig, *, fetch: bool) -> tuple[list[Task], list[ClipExpError]]:
    refused: list[ClipExpError] = []
    for name, task in config.task.items():
        if task.of_validation:
            problem = (
                f"task.{name}.kind={task.kind} scores a run on its validation data, which training does by itself."
            )
            refused.append(ConfigError(f"{problem} Choose another task, as task=retrieval."))
        elif name in ("train", "val"):
            refused.append(ConfigError(f"task.{name}: this name is taken by metrics of training: rename your task."))
    wanted = {name: task for name, task in config.task.items() if not task.of_validation}
    tasks, errors = prepare_tasks(wanted, config.output_dir, None, fetch=fetch) if wanted else ([], [])
    return tasks, [*refused, *errors]


def _check_monitor(config: TrainConfig, monitor: str, tasks: list[Task]) -> Iterator[str]:
    measured = [f"{task.name}/{metric}" for task in tasks for metric in task.metrics]
    top5 = {f"{task.name}/top5": task.num_classes for task in tasks if task.num_classes is not None}
    if monitor in measured:
        if config.task_every_n_steps is None:
            yield f"monitor={monitor} would be measured only once, at the end: set task_every_n_steps."
    elif monitor in top5:
        yield _top5_problem(monitor, top5[monitor])
    elif monitor not in OF_VALIDATION:
        yield f"monitor={monitor} is no metric of validation or of a task: {nearest(monitor, [*OF_VALIDATION, *measured])}"
    elif config.data.generate is None and not config.data.val:
        yield f"monitor={monitor} needs validation data: set data.val."
    elif monitor.startswith("val/zeroshot") and config.data.label_key is None:
        yield f"monitor={monitor} needs class names: set data.label_key."
