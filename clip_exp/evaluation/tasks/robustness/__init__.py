"""Robustness on six ImageNet datasets: its configuration and data. Does not import torch before it scores a model."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from clip_exp.config.base import PathText, Texts, Unused, unused_keys
from clip_exp.config.evaluation import SOURCES, ClassNames, LabeledDataConfig, TaskConfig
from clip_exp.errors import ClipExpError, ConfigError, gravest, nearest
from clip_exp.evaluation.task import Task
from clip_exp.evaluation.tasks.zero_shot import ClassificationTask, ZeroShotTaskConfig

if TYPE_CHECKING:
    from clip_exp.evaluation.evaluated_model import ComputeResult, EvaluatedModel

UNSHIFTED = "imagenet"  # dataset with the distribution of ImageNet's training images
WEIGHTS_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")


@dataclass(frozen=True)
class ImageNetSet:
    """ImageNet dataset with its usual folders."""

    classes: str  # see `LabeledDataConfig.classes`
    folders: tuple[str, ...]  # relative to the root, in lowercase with `-` for `_`; the first that exists is used


SETS = {
    "imagenet": ImageNetSet(
        "imagenet",
        (
            "imagenet/val",
            "imagenet/validation",
            "imagenet-1k/val",
            "imagenet1k/val",
            "ilsvrc2012/val",
            "ilsvrc2012-img-val",
            "imagenet-val",
            "val",
            "imagenet",
            "imagenet-1k",
            "imagenet1k",
        ),
    ),
    "imagenet_v2": ImageNetSet(
        "imagenet",
        (
            "imagenetv2-matched-frequency-format-val",
            "imagenetv2-matched-frequency",
            "imagenetv2",
            "imagenet-v2",
        ),
    ),
    "imagenet_r": ImageNetSet("imagenet_r", ("imagenet-r",)),
    "objectnet": ImageNetSet("objectnet", ("objectnet-1.0", "objectnet")),
    "imagenet_sketch": ImageNetSet("imagenet", ("imagenet-sketch/sketch", "imagenet-sketch", "sketch")),
    "imagenet_a": ImageNetSet("imagenet_a", ("imagenet-a",)),
}


class ImageNetSetConfig(LabeledDataConfig):
    """One dataset of a robustness task; null: the default of the dataset or of the task."""

    classes: ClassNames | None = Field(None, description="see classes of a zero_shot task; null: the set's own")  # type: ignore[assignment]
    templates: Texts | None = Field(None, description="see templates of a zero_shot task; null: the task's")

    unused: ClassVar = ()  # checked in `RobustnessTaskConfig.prepare`, when the folder is known


class RobustnessTaskConfig(TaskConfig):
    """Zero-shot on ImageNet and its five shifted versions, next to a supervised network (CLIP paper, figure 13)."""

    kind: Literal["robustness"] = "robustness"
    root: PathText | None = Field(None, description="folder with the datasets under their usual names")
    sets: dict[str, ImageNetSetConfig | None] = Field(
        {}, description="overrides by name of the dataset; null leaves the dataset out"
    )
    templates: Texts = Field(
        "openai", description="openai (80), simple (7), a list, or a file with one template per line"
    )
    baseline: str | None = Field(
        "resnet101", description="classifier of torchvision.models trained on ImageNet-1k; null: none"
    )
    baseline_weights: str = Field("IMAGENET1K_V1", description="torchvision's name for its weights, or a file")

    title: ClassVar[str] = "Robustness"
    headline: ClassVar[tuple[str, ...]] = ("mean_of_shifted/top1",)
    unused: ClassVar[tuple[Unused, ...]] = (
        Unused("baseline_weights", lambda task: task.baseline is None, "without {at}baseline"),
    )

    def prepare(self, name: str, output_dir: str, run: Any = None) -> "list[RobustnessTask]":
        """Find the ImageNet datasets."""
        if self.baseline is not None:
            weights_file(self.baseline_weights, f"task.{name}")
        sets: dict[str, ClassificationTask] = {}
        errors: list[ClipExpError] = []
        for each, config in configure_sets(name, self).items():
            errors += map(ConfigError, unused_keys(config, (), f"task.{name}.sets.{each}."))
            try:
                (sets[each],) = config.prepare(f"{name}.sets.{each}", output_dir)
            except ClipExpError as error:
                errors.append(error)
                continue
            if self.baseline is not None and sets[each].data.imagenet is None:
                errors.append(
                    ConfigError(
                        f"task.{name}.sets.{each}.classes cannot be matched with ImageNet's 1,000 classes, so "
                        f"{self.baseline} cannot be scored. Leave out `classes`, or set task.{name}.baseline=null."
                    )
                )
        if errors:
            raise gravest(errors)
        return [RobustnessTask(name, self, sets)]


@dataclass(frozen=True)
class RobustnessTask(Task):
    config: RobustnessTaskConfig
    sets: dict[str, ClassificationTask]

    @property
    def metrics(self) -> list[str]:
        return [f"{name}/top1" for name in (*self.sets, "mean_of_shifted")]

    def score(self, model: "EvaluatedModel") -> "ComputeResult":
        from clip_exp.evaluation.tasks.robustness.score import score_robustness  # imports torch

        return score_robustness(self, model)


def configure_sets(task_name: str, task: RobustnessTaskConfig) -> dict[str, ZeroShotTaskConfig]:
    """Return the zero-shot task of each requested dataset, in the order of figure 13.

    Raises:
        ConfigError: a dataset is unknown or not found, or all are left out.
    """
    where = f"task.{task_name}"
    errors: list[ClipExpError] = [
        ConfigError(f"{where}.sets.{given} does not exist: {nearest(given, SETS)}")
        for given in task.sets
        if given not in SETS
    ]
    found: dict[str, ZeroShotTaskConfig] = {}
    missing: list[str] = []
    for name in SETS:
        if name in task.sets and task.sets[name] is None:  # left out by the user
            continue
        given = task.sets.get(name)
        own = {key: value for key, value in (vars(given) if given is not None else {}).items() if value is not None}
        config = ZeroShotTaskConfig(**{"classes": SETS[name].classes, "templates": task.templates, **own})
        if not any(getattr(config, source) for source in SOURCES) and task.root is not None:
            folder = _find(Path(task.root).expanduser(), name)
            config.root = str(folder) if folder is not None else None
        found[name] = config
        if not any(getattr(config, source) for source in SOURCES):
            missing.append(name)
    if missing:
        own_root, none = f"{where}.sets.{missing[0]}.root=DIR", f"{where}.sets.{missing[0]}=null"
        expected = "; ".join(f"{name} ({' or '.join(SETS[name].folders)})" for name in missing)
        errors.append(
            ConfigError(
                f"{where}.root has no value: give the folder that contains {', '.join(missing)}. For a dataset elsewhere use {own_root}; "
                f"to leave one out, {none}."
                if task.root is None
                else f"{where}.root={task.root} does not contain {expected}. For a dataset elsewhere use {own_root}; to leave one out, {none}."
            )
        )
    if errors:
        raise gravest(errors)
    if not found:
        raise ConfigError(f"{where}.sets leaves out all datasets: keep at least one of {', '.join(SETS)}.")
    return found


def _find(root: Path, name: str) -> Path | None:
    """Return the folder of a dataset in the root; its name may have any case, and `_` or `-`."""
    for candidate in SETS[name].folders:
        folder: Path | None = root
        for part in candidate.split("/"):
            children = sorted(folder.iterdir()) if folder is not None and folder.is_dir() else []
            matching = (child for child in children if child.name.lower().replace("_", "-") == part)
            folder = next((child for child in matching if child.is_dir()), None)
        if folder is not None:
            return folder
    return None


def weights_file(weights: str, where: str) -> Path | None:
    """Return the file of `baseline_weights`; None if it is a name of published weights of torchvision.

    Raises:
        ConfigError: the file does not exist.
    """
    path = Path(weights).expanduser()
    if path.suffix not in WEIGHTS_SUFFIXES and not path.is_file():
        return None
    if not path.is_file():
        raise ConfigError(f"{where}.baseline_weights={weights}: no such file.")
    return path
