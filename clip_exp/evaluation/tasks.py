"""From `task` of a configuration to what is to be scored: files found, names matched, no weights loaded. No torch."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip_exp.config.evaluation_schema import (
    AutoTaskConfig,
    RetrievalTaskConfig,
    TaskKind,
    ZeroShotTaskConfig,
)
from clip_exp.config.load import nearest, strict_dataclass
from clip_exp.config.paths import options
from clip_exp.config.schema import DataConfig, OnBadRow, TrainConfig
from clip_exp.data import samples
from clip_exp.data.pictures import PictureFiles, Pictures
from clip_exp.data.tables import read_table
from clip_exp.errors import ClipExpError, ConfigError
from clip_exp.evaluation.datasets import LabeledImages, from_folder, from_table
from clip_exp.evaluation.prompts import templates
from clip_exp.inference.sources import Source

TaskConfig = AutoTaskConfig | ZeroShotTaskConfig | RetrievalTaskConfig
CONFIGS: dict[str, type[TaskConfig]] = {
    TaskKind.auto: AutoTaskConfig,
    TaskKind.zero_shot: ZeroShotTaskConfig,
    TaskKind.retrieval: RetrievalTaskConfig,
}
NAME = re.compile(r"[\w.@+-]+")  # becomes a file's name


@dataclass(frozen=True)
class ClassificationTask:
    name: str
    images: LabeledImages
    templates: list[str]
    config: ZeroShotTaskConfig


@dataclass(frozen=True)
class RetrievalTask:
    name: str
    pictures: Pictures  # each once
    captions: list[str]
    caption_image: list[int]  # position in `paths` of each caption's picture
    where: str


Task = ClassificationTask | RetrievalTask


def prepare_tasks(
    wanted: dict[str, Any], output_dir: str, source: Source | None
) -> tuple[list[Task], list[ClipExpError]]:
    """Everything that `task` of a configuration asks for, and everything that is wrong with it.

    Args:
        wanted: name to values.
        source: the model, whose run tells `auto` tasks what to score; None if it was not found: they are passed over.
    """
    tasks: list[Task] = []
    errors: list[ClipExpError] = []
    if not wanted:
        errors.append(ConfigError(f"no task: choose from task=[{','.join(options('task'))}]."))
    for name, values in wanted.items():
        try:
            tasks.extend(_prepare(name, parse_task(name, values), output_dir, source))
        except ClipExpError as error:
            errors.append(error)
    names = [task.name for task in tasks]
    errors += [
        ConfigError(f"two tasks are called {name}: rename yours.")
        for name in sorted(set(names))
        if names.count(name) > 1
    ]
    return tasks, errors


def parse_task(name: str, values: Any) -> TaskConfig:
    """The typed configuration of one task.

    Raises:
        ConfigError: an unknown kind or key, a missing value, a wrong type.
    """
    where = f"task.{name}"
    if not NAME.fullmatch(name):
        raise ConfigError(f"{where}: a task's name becomes a file's name; use letters, digits, '_', '-', '.'.")
    if not isinstance(values, dict) or "kind" not in values:
        raise ConfigError(f"{where}.kind has no value: one of {', '.join(TaskKind)}.")
    kind = str(values["kind"])
    if kind not in CONFIGS:
        raise ConfigError(f"{where}.kind={kind} does not exist: {nearest(kind, TaskKind)}")
    return strict_dataclass(CONFIGS[kind], values, where)


def _prepare(name: str, task: TaskConfig, output_dir: str, source: Source | None) -> Iterator[Task]:
    if isinstance(task, ZeroShotTaskConfig):
        yield prepare_classification(name, task, output_dir)
    elif isinstance(task, RetrievalTaskConfig):
        yield prepare_retrieval(name, task)
    elif source is not None:
        yield from _prepare_auto(name, output_dir, source.run)


def prepare_classification(
    name: str, task: ZeroShotTaskConfig, output_dir: str, on_bad_row: OnBadRow = OnBadRow.error
) -> ClassificationTask:
    """Find the pictures, labels, names and templates of a zero-shot task.

    Raises:
        ConfigError, DataError: see `evaluation.datasets` and `evaluation.prompts`.
    """
    where = f"task.{name}"
    given = [key for key in ("root", "table", "generate") if getattr(task, key) is not None]
    if len(given) != 1:
        raise ConfigError(
            f"{where}: give exactly one of root, table and generate; given: {', '.join(given) or 'none'}."
        )
    prompts = templates(task.templates, f"{where}.templates")
    if task.root is not None:
        images = from_folder(task.root, task.classes, f"{where}.root")
    else:
        if task.table is not None:
            _require_tables(name, task.table)
        table = task.table if task.generate is None else str(samples.generate(task.generate, Path(output_dir)).val)
        images = from_table(
            table,
            image_key=task.image_key,
            label_key=task.label_key,
            image_root=task.image_root,
            separator=task.separator,
            encoding=task.encoding,
            on_bad_row=on_bad_row,
            classes=task.classes,
        )
    return ClassificationTask(name, images, prompts, task)


def prepare_retrieval(name: str, task: RetrievalTaskConfig, on_bad_row: OnBadRow = OnBadRow.error) -> RetrievalTask:
    """Find the pictures and captions of a retrieval task; rows with the same path are captions of one picture.

    Raises:
        ConfigError, DataError: see `data.tables.read_table`.
    """
    _require_tables(name, task.table)
    pairs = read_table(
        task.table,
        image_key=task.image_key,
        caption_key=task.caption_key,
        image_root=task.image_root,
        separator=task.separator,
        encoding=task.encoding,
        on_bad_row=on_bad_row,
    )
    assert pairs.captions is not None
    caption_image = pairs.image_index().tolist()
    first_row = {picture: row for row, picture in reversed(list(enumerate(caption_image)))}
    paths = [pairs.image_path(first_row[picture]) for picture in range(len(first_row))]
    return RetrievalTask(name, PictureFiles(paths), pairs.captions.to_pylist(), caption_image, str(task.table))


def _require_tables(name: str, tables: Any) -> None:
    for table in [tables] if isinstance(tables, str) else tables:
        if not Path(str(table)).is_file():
            raise ConfigError(f"task.{name}.table={table}: no such file (seen from {Path.cwd()}).")


def _prepare_auto(name: str, output_dir: str, run: TrainConfig | None) -> Iterator[Task]:
    """`val_retrieval`, and `val_zero_shot` where the validation data have labels."""
    if run is None:
        raise ConfigError(
            f"task.{name} scores what a run validated on, but no run is given: choose from {options('task')}."
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
        "image_key": data.image_key,
        "separator": data.separator,
        "encoding": data.encoding,
    }
    yield prepare_retrieval(
        "val_retrieval", RetrievalTaskConfig(**common, caption_key=data.caption_key), data.on_bad_row
    )
    if data.label_key is not None:
        zero_shot = ZeroShotTaskConfig(**common, label_key=data.label_key, templates=data.templates)
        yield prepare_classification("val_zero_shot", zero_shot, output_dir, data.on_bad_row)


def _validation_table(data: DataConfig, output_dir: str) -> Any:
    return data.val if data.generate is None else str(samples.generate(data.generate, Path(output_dir)).val)
