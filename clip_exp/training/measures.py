"""What a run is measured by while it trains: its tasks, found before anything is loaded, and the metric that it watches. No torch."""

from collections.abc import Iterator

from clip_exp.config.evaluation_schema import TaskKind
from clip_exp.config.load import nearest
from clip_exp.config.schema import TrainConfig
from clip_exp.errors import ClipExpError, ConfigError, gravest
from clip_exp.evaluation.prepared import RetrievalTask, RobustnessTask, Task
from clip_exp.evaluation.tasks import prepare_tasks

RECALLS = [f"recall@{k}_{way}" for k in (1, 5, 10) for way in ("i2t", "t2i")]
RETRIEVAL = ["median_rank_i2t", "median_rank_t2i", *RECALLS]
CLASSIFICATION = ["top1", "top5", "mean_per_class_recall"]
VALIDATION = [f"val/{name}" for name in ("loss", "zeroshot_top1", "zeroshot_top5", *RETRIEVAL)]
TAKEN = ("train", "val")  # what names of other metrics begin with


def training_tasks(config: TrainConfig) -> list[Task]:
    """The tasks of a run, ready to be scored.

    Raises:
        ClipExpError: of the class of the gravest problem, with a line for every problem.
    """
    tasks, errors = _find_tasks(config)
    if errors:
        raise gravest(errors)
    return tasks


def check_measures(config: TrainConfig) -> list[ClipExpError]:
    """What is wrong with a run's tasks, `monitor` and `patience`."""
    tasks, errors = _find_tasks(config)
    lost = {*config.task} - {task.name for task in tasks}
    if config.task_every_n_steps is not None and not config.task:
        errors.append(ConfigError(f"task_every_n_steps={config.task_every_n_steps} needs a task, as task=imagenet."))
    if config.patience is not None and config.monitor is None:
        errors.append(ConfigError("patience needs a metric to watch: set monitor (monitor=val/loss)."))
    if config.monitor_mode not in ("auto", "min", "max"):
        errors.append(ConfigError(f"monitor_mode={config.monitor_mode} must be auto, min or max."))
    if config.monitor is not None and config.monitor.partition("/")[0] not in lost:
        errors += map(ConfigError, _check_monitor(config, config.monitor, tasks))
    return errors


def _find_tasks(config: TrainConfig) -> tuple[list[Task], list[ClipExpError]]:
    refused: list[ClipExpError] = []
    for name, values in config.task.items():
        if isinstance(values, dict) and values.get("kind") == TaskKind.auto:
            refused.append(
                ConfigError(
                    f"task.{name}.kind=auto scores a run on its validation data, which training does by itself. "
                    "Choose another task, as task=retrieval."
                )
            )
        elif name in TAKEN:
            refused.append(ConfigError(f"task.{name}: this name is taken by metrics of training: rename your task."))
    tasks, errors = prepare_tasks(config.task, config.output_dir, None) if config.task else ([], [])
    return tasks, [*refused, *errors]


def _check_monitor(config: TrainConfig, monitor: str, tasks: list[Task]) -> Iterator[str]:
    measured = {f"{task.name}/{metric}" for task in tasks for metric in _metrics(task)}
    if monitor in measured:
        if config.task_every_n_steps is None:
            yield f"monitor={monitor} would be measured only once, at the end: set task_every_n_steps."
        return
    if monitor not in VALIDATION:
        yield f"monitor={monitor} is no metric of validation or of a task: {nearest(monitor, [*VALIDATION, *measured])}"
    elif config.data.generate is None and not config.data.val:
        yield f"monitor={monitor} needs validation data: set data.val."
    elif monitor.startswith("val/zeroshot") and config.data.label_key is None:
        yield f"monitor={monitor} needs class names: set data.label_key."


def _metrics(task: Task) -> list[str]:
    """Names of what scoring the task yields."""
    if isinstance(task, RetrievalTask):
        return RETRIEVAL
    if isinstance(task, RobustnessTask):
        return [f"{name}/top1" for name in (*task.sets, "mean_of_shifted")]
    return CLASSIFICATION
