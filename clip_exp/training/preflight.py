"""Checks of a training run before anything is loaded, so that all problems are reported at once.

The rules of the configuration come first, then files and devices, and last the tables, which may take minutes to read.
"""

from collections.abc import Iterable, Iterator

from clip_exp.config import targets
from clip_exp.config.base import Target, plain, problems, typed_keys
from clip_exp.config.training import TrainConfig
from clip_exp.data.preflight import RunTables, check_files, check_tables
from clip_exp.devices import Devices, parse_devices, resolve_accelerator
from clip_exp.errors import ClipExpError, ConfigError, gravest, nearest
from clip_exp.evaluation.launch import prepare_tasks
from clip_exp.evaluation.task import Task
from clip_exp.ranks.environment import device_problems, is_first_rank, outer_placement
from clip_exp.reports.names import CERTAIN, VALIDATION, better
from clip_exp.runs import OLDER_COLUMNS, name_problems
from clip_exp.secrets import leaks
from clip_exp.weights.find import check_pretrained

SCHEDULES = "clip_exp.training.schedule."


def check_train(config: TrainConfig, arguments: Iterable[str] = ()) -> RunTables:
    """Check that a run can work, and return its opened tables.

    Args:
        config: configuration of the run.
        arguments: command line arguments; each of their keys must have an effect.

    Raises:
        ClipExpError: an error of the most serious kind that was found, with a line for every problem.
        DataError: a table cannot be read, or none of its images can.
    """
    typed = typed_keys(arguments)
    found = [
        *problems(config, typed),
        *config.model.text.training_problems(config.model),
        *(p for tower, start in config.starts.items() for p in check_pretrained(start, config.model, tower=tower)),
        *check_files(config.data),
        *name_problems(config.name),
        *leaks(plain(config)),
    ]
    try:
        found += _check_batch(config, _ranks(config, requested_devices(config)) or 1)
    except ConfigError as error:
        found.append(str(error))
    if not found:
        found += custom_problems(config)
    # The first rank downloads the data of tasks before the run folder is created; the other ranks then read it from disk.
    errors = [*map(ConfigError, found), *check_measures(config, fetch=not found and is_first_rank())]
    if not errors and config.callbacks.extra:
        from clip_exp.training.callbacks import extra_problems  # imports torch

        errors += map(ConfigError, extra_problems(config))
    if not errors and config.logger.extra:
        from clip_exp.training.metrics import logger_problems  # imports torch

        errors += map(ConfigError, logger_problems(config.logger))
    if not errors:
        devices = requested_devices(config)
        absent = [*device_problems(devices, config.trainer.num_nodes, "trainer.")]
        if config.trainer.sync_batchnorm and not absent:
            absent += _check_sync(config, devices)
        if not absent and _ranks(config, devices) is None:  # the number of ranks is that of the available GPUs
            absent += _check_batch(config, devices.count() * (config.trainer.num_nodes or 1))
        errors += map(ConfigError, absent)
    if errors:
        raise gravest(errors)
    tables = check_tables(config)
    if tables.rows < config.global_batch_size:
        raise ConfigError(
            f"global_batch_size={config.global_batch_size} is more than the {tables.rows:,} training rows: lower it, or add data."
        )
    val = None if tables.opened is None else tables.opened.val
    if val is not None and (wrong := list(check_validation_classes(config, len(val.class_names)))):
        raise ConfigError("\n".join(wrong))
    if config.epochs is not None and (wrong := list(config.length_problems(steps_of(config, tables.rows)))):
        raise ConfigError("\n".join(wrong))
    return tables


def custom_problems(config: TrainConfig) -> Iterator[str]:
    """Yield the problems of the user's own code: names, arguments, and what can be created before the data is read.

    Raises:
        TargetNotAllowedError: an object, such as a teacher, is read from a file that names code which is not allowed.
    """
    named = list(targets.problems(config))
    yield from named
    if named:
        return
    try:
        if config.data.transform is not None:
            from clip_exp.data.transform import build_transform  # imports torch

            build_transform(config.data.transform, config.model.image.image_size)
        yield from config.loss.custom_problems(config.data.columns)  # also imports torch
        if isinstance(config.optimizer, Target) or not config.scheduler.target.startswith(SCHEDULES):
            from clip_exp.training.optim import rehearse_optimizer  # imports torch

            rehearse_optimizer(config.optimizer, config.scheduler, config.finetune, config.max_steps)
    except targets.TargetNotAllowedError:  # the command line prints a command that allows the code
        raise
    except ConfigError as error:
        yield str(error)


def requested_devices(config: TrainConfig) -> Devices:
    """Return the devices per node that the configuration requests; see `parse_devices`."""
    return parse_devices(config.trainer.accelerator, config.trainer.devices, "trainer.")


def _ranks(config: TrainConfig, devices: Devices) -> int | None:
    """Return the number of ranks, as set by the launcher or the configuration; None: as many as there are GPUs."""
    placement = outer_placement()
    if placement is not None:
        return placement.world_size
    here = 1 if devices.accelerator == "cpu" and devices.requested is None else devices.requested
    return None if here is None else here * (config.trainer.num_nodes or 1)


def _check_batch(config: TrainConfig, ranks: int) -> Iterator[str]:
    if config.global_batch_size % ranks:
        yield (
            f"global_batch_size={config.global_batch_size} must be a multiple of the {ranks} processes "
            "(trainer.devices times trainer.num_nodes)."
        )


def _check_sync(config: TrainConfig, devices: Devices) -> Iterator[str]:
    on_cpu = resolve_accelerator(config.trainer.accelerator, "trainer.") == "cpu"
    if on_cpu and (_ranks(config, devices) or devices.count()) > 1:
        yield "trainer.sync_batchnorm is not supported on several CPU processes: PyTorch's SyncBatchNorm needs GPUs. Leave it out."


def steps_of(config: TrainConfig, rows: int) -> int:
    """Return the optimizer steps of the run: `max_steps`, or the number of whole batches in `epochs` passes over `rows`, at least 1."""
    if config.max_steps is not None:
        return config.max_steps
    assert config.epochs is not None
    return max(1, int(config.epochs * rows) // config.global_batch_size)


def rehearse(config: TrainConfig) -> None:
    """Check, on a model on the meta device, that the layers exist that `finetune` counts or names.

    Args:
        config: configuration that contains the architectures of its encoders, so that nothing is downloaded.

    Raises:
        ConfigError: the model cannot be built, or lacks the layers.
    """
    tuning = config.finetune
    counts_layers = tuning.lora is not None or any(t.unfrozen_blocks is not None for t in (tuning.image, tuning.text))
    if not config.model.has_foreign_tower and not counts_layers:
        return
    import torch

    from clip_exp.models.clip import build_model
    from clip_exp.training.lora import check_layers
    from clip_exp.training.optim import prepare

    with torch.device("meta"):
        model = build_model(config.model)
    if tuning.lora is None:
        prepare(model, tuning, config.model)
    else:  # encoders of transformers do not run on the meta device, so whether layers are called cannot be checked
        check_layers({"image": model.image, "text": model.text}, tuning.lora)


OF_VALIDATION = [f"val/{name}" for name in VALIDATION]


def training_tasks(config: TrainConfig) -> list[Task]:
    """Return the tasks of a run, ready to be scored; raise an error with a line for every problem."""
    tasks, errors = _find_tasks(config, fetch=True)
    if errors:
        raise gravest(errors)
    return tasks


def check_measures(config: TrainConfig, *, fetch: bool = False) -> list[ClipExpError]:
    """Return the problems of a run's tasks and of its `monitor`; `fetch` allows tasks without problems to download their data."""
    tasks, errors = _find_tasks(config, fetch=fetch)
    lost = {*config.task} - {task.name for task in tasks}
    if config.monitor is not None and config.monitor.partition("/")[0] not in lost:
        errors += map(ConfigError, check_monitor(config, config.monitor, tasks))
    return errors


def check_validation_classes(config: TrainConfig, classes: int) -> Iterator[str]:
    """Yield the problems of `monitor` that depend on the number of classes in the validation data."""
    if config.monitor in ("val/top1", "val/top5") and not classes:
        yield (
            f"monitor={config.monitor} is not measured, because the validation data has no labels: give a Dataset the attribute `classes` "
            "with the names of the classes, or a table a column of labels (data.label_key)."
        )
    elif config.monitor == "val/top5" and classes <= CERTAIN:
        yield _top5_problem(config.monitor, classes)


def is_of_task(monitor: str | None) -> bool:
    """Return True if a metric is that of a task, not of validation."""
    return monitor is not None and not monitor.startswith("val/")


def monitor_mode(monitor: str | None, mode: str) -> str:
    """Return `min` or `max`: which values of `monitor` are better, by `mode` or, where that is `auto`, by the metric itself."""
    return better(monitor or "") if mode == "auto" else mode


def _top5_problem(monitor: str, classes: int) -> str:
    return (
        f"monitor={monitor} is not measured: with {classes} classes the correct one is always among the top five. Use "
        f"monitor={monitor.removesuffix('top5')}top1."
    )


def _find_tasks(config: TrainConfig, *, fetch: bool) -> tuple[list[Task], list[ClipExpError]]:
    refused: list[ClipExpError] = []
    for name, task in config.task.items():
        if task.of_validation:
            problem = f"task.{name}.kind={task.kind} scores a run on its validation data, which training already does."
            other = "another table (task=retrieval task.retrieval.table=pairs.csv), or choose another task"
            refused.append(ConfigError(f"{problem} Give {other}."))
        elif name in ("train", "val"):
            refused.append(
                ConfigError(
                    f"task.{name}: this name is reserved for metrics of training and validation. Rename the task."
                )
            )
    requested = {name: task for name, task in config.task.items() if not task.of_validation}
    tasks, errors = prepare_tasks(requested, config.output_dir, None, fetch=fetch) if requested else ([], [])
    return tasks, [*refused, *errors]


def check_monitor(config: TrainConfig, monitor: str, tasks: list[Task]) -> Iterator[str]:
    """Yield the problems of a metric that is to be monitored: it is not measured, or only at the end."""
    measured = [f"{task.name}/{metric}" for task in tasks for metric in task.metrics]
    top5 = {f"{task.name}/top5": task.num_classes for task in tasks if task.num_classes is not None}
    if monitor in measured:
        if config.task_every_n_steps is None:
            yield f"monitor={monitor} would be measured only once, at the end: set task_every_n_steps."
    elif monitor in top5:
        yield _top5_problem(monitor, top5[monitor])
    elif monitor.startswith("val/") and monitor in OLDER_COLUMNS:
        yield f"monitor={monitor} does not exist: did you mean '{OLDER_COLUMNS[monitor]}'?"
    elif monitor not in OF_VALIDATION:
        yield f"monitor={monitor} is not a metric of validation or of a task: {nearest(monitor, [*OF_VALIDATION, *measured])}"
    elif not config.data.has_val:
        yield f"monitor={monitor} needs validation data: set data.val."
    elif config.trainer.limit_val_batches == 0:
        yield f"monitor={monitor} is not measured with trainer.limit_val_batches=0: leave that out."
    elif monitor in ("val/top1", "val/top5") and not config.data.may_have_labels:
        yield f"monitor={monitor} needs class names: set data.label_key."
