"""From `task` of a configuration to what is to be scored: files found, names matched, no weights loaded. No torch."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from clip_exp.config.base import idle_keys
from clip_exp.config.data import DataConfig
from clip_exp.config.evaluation import (
    KNNTaskConfig,
    LabeledDataConfig,
    LinearProbeTaskConfig,
    RetrievalTaskConfig,
    RobustnessTaskConfig,
    TaskConfig,
    ZeroShotTaskConfig,
)
from clip_exp.config.files import options
from clip_exp.config.training import TrainConfig
from clip_exp.data.generated import generate
from clip_exp.data.pictures import TablePictures
from clip_exp.errors import ClipExpError, ConfigError, gravest
from clip_exp.evaluation.prepared import ClassificationTask, RetrievalTask, RobustnessTask, Task
from clip_exp.evaluation.sets.class_names import templates
from clip_exp.evaluation.sets.datasets import labeled_images, read_pairs, require_tables
from clip_exp.evaluation.sets.imagenet_sets import configure_sets, weights_file
from clip_exp.evaluation.splits import prepare_knn, prepare_probe
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
    errors: list[ClipExpError] = [ConfigError(problem) for name in wanted for problem in _name_problems(name)]
    if not wanted:
        errors.append(ConfigError(f"no task: choose from task=[{','.join(options('task'))}]."))
    for name, task in sorted(wanted.items(), key=lambda item: _fetches(item[1])):
        if _fetches(task) and (errors or not fetch):
            continue  # what else is wrong is reported before hours of fetching
        try:
            prepared[name] = list(_prepare(name, task, output_dir, run))
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


def _fetches(task: TaskConfig) -> bool:
    parts = (task, getattr(task, "train", None))
    return any(isinstance(part, LabeledDataConfig) and part.download for part in parts)


def _name_problems(name: str) -> Iterator[str]:
    """Yield why a task may not have a name, which becomes a file's name and is distinguished from those of other results by its ending."""
    if not NAME.fullmatch(name) or len(name.encode()) > MAX_NAME:
        yield f"task.{name}: a task's name becomes a file's name; use letters, digits, '_', '-', '.', {MAX_NAME} bytes at most."
    elif task_of(name) != name:
        yield f"task.{name}: this name ends like those of a run's results of other checkpoints: rename your task."


def _prepare(name: str, task: TaskConfig, output_dir: str, run: TrainConfig | None) -> Iterator[Task]:
    if isinstance(task, ZeroShotTaskConfig):
        yield prepare_classification(name, task, output_dir)
    elif isinstance(task, RetrievalTaskConfig):
        yield prepare_retrieval(name, task)
    elif isinstance(task, LinearProbeTaskConfig):
        yield prepare_probe(name, task, output_dir)
    elif isinstance(task, KNNTaskConfig):
        yield prepare_knn(name, task, output_dir)
    elif isinstance(task, RobustnessTaskConfig):
        yield prepare_robustness(name, task, output_dir)
    else:
        yield from _prepare_auto(name, output_dir, run)


def prepare_classification(name: str, task: ZeroShotTaskConfig, output_dir: str) -> ClassificationTask:
    """Find the pictures, labels, names and templates of a zero-shot task.

    Raises:
        ConfigError, DataError: see `evaluation.sets.datasets` and `evaluation.sets.class_names`.
    """
    where = f"task.{name}"
    prompts = templates(task.templates, f"{where}.templates")
    images = labeled_images(task, where, output_dir)
    return ClassificationTask(name, images, prompts, task)


def prepare_retrieval(name: str, task: RetrievalTaskConfig) -> RetrievalTask:
    """Find the pictures and captions of a retrieval task; rows that name the same file are captions of one picture.

    Raises:
        ConfigError, DataError: see `data.tables.read_table`.
    """
    require_tables(task.table, f"task.{name}")
    pairs = read_pairs(
        task.table,
        f"task.{name}",
        image_key=task.image_key,
        caption_key=task.caption_key,
        image_root=task.image_root,
        separator=task.separator,
        encoding=task.encoding,
        on_bad_row=task.on_bad_row,
        filter=task.filter,
    )
    assert pairs.captions is not None
    caption_image = pairs.image_index().tolist()
    first_row = {picture: row for row, picture in reversed(list(enumerate(caption_image)))}
    rows = [first_row[picture] for picture in range(len(first_row))]
    pictures = TablePictures(pairs, rows, task.allow_outside_root)
    about = pairs.shortcomings()
    return RetrievalTask(name, pictures, pairs.captions.to_pylist(), caption_image, str(task.table), about)


def prepare_robustness(name: str, task: RobustnessTaskConfig, output_dir: str) -> RobustnessTask:
    """Find the ImageNet sets of a robustness task.

    Raises:
        ConfigError: see `evaluation.sets.imagenet_sets`; a set whose classes are not known to be ImageNet's, beside a baseline.
        DataError: see `evaluation.sets.datasets`. Several problems are told at once.
    """
    if task.baseline is not None:
        weights_file(task.baseline_weights, f"task.{name}")
    sets: dict[str, ClassificationTask] = {}
    errors: list[ClipExpError] = []
    for each, config in configure_sets(name, task).items():
        errors += map(ConfigError, idle_keys(config, (), f"task.{name}.sets.{each}."))
        try:
            sets[each] = prepare_classification(f"{name}.sets.{each}", config, output_dir)
        except ClipExpError as error:
            errors.append(error)
            continue
        if task.baseline is not None and sets[each].images.imagenet is None:
            errors.append(
                ConfigError(
                    f"task.{name}.sets.{each}.classes: which of ImageNet's 1,000 classes these are is not known, so "
                    f"{task.baseline} cannot be scored on them. Leave out `classes`, or set task.{name}.baseline=null."
                )
            )
    if errors:
        raise gravest(errors)
    return RobustnessTask(name, sets, task)


def _prepare_auto(name: str, output_dir: str, run: TrainConfig | None) -> Iterator[Task]:
    """`val_retrieval`, and `val_zero_shot` where the validation data have labels."""
    if run is None:
        raise ConfigError(
            f"task.{name} scores what a run validated on, but no run is given: give run=DIR, or another task, as task=retrieval."
        )
    table = _validation_table(run.data, output_dir)
    if table is None:
        raise ConfigError(
            f"task.{name}: the run has no validation data (data.val). Choose another task, as task=retrieval."
        )
    data = run.data
    common: dict[str, Any] = {
        "table": table,
        "image_root": data.image_root if data.generate is None else None,
        "allow_outside_root": data.allow_outside_root,
        "image_key": data.image_key,
        "separator": data.separator,
        "encoding": data.encoding,
        "on_bad_row": data.on_bad_row,
        "filter": data.filter,
    }
    yield prepare_retrieval("val_retrieval", RetrievalTaskConfig(**common, caption_key=data.caption_key))
    if data.label_key is not None:
        zero_shot = ZeroShotTaskConfig(**common, label_key=data.label_key, templates=data.templates)
        yield prepare_classification("val_zero_shot", zero_shot, output_dir)


def _validation_table(data: DataConfig, output_dir: str) -> Any:
    return data.val if data.generate is None else str(generate(data.generate, Path(output_dir)).val)
