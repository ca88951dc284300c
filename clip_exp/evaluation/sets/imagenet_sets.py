"""The six ImageNet sets of a robustness task: their names, folders and classes. No torch."""

from dataclasses import dataclass
from pathlib import Path

from clip_exp.config.base import nearest
from clip_exp.config.evaluation import ImageNetSetConfig, RobustnessTaskConfig, ZeroShotTaskConfig
from clip_exp.errors import ClipExpError, ConfigError, gravest
from clip_exp.evaluation.sets.datasets import SOURCES

UNSHIFTED = "imagenet"  # the set whose distribution ImageNet's training pictures have
WEIGHTS_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")


@dataclass(frozen=True)
class ImageNetSet:
    """A set as it is usually stored."""

    classes: str  # see `LabeledDataConfig.classes`
    folders: tuple[str, ...]  # below the root of all, in lower case with `-` for `_`; the first that exists is taken


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


def configure_sets(task_name: str, task: RobustnessTaskConfig) -> dict[str, ZeroShotTaskConfig]:
    """The zero-shot task of each set that is wanted, in the order of figure 13.

    Raises:
        ConfigError: unknown sets, and sets that were not found, all at once.
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
        if name in task.sets and task.sets[name] is None:  # left out on purpose
            continue
        found[name] = _configure(name, task.sets.get(name), task)
        if not any(getattr(found[name], source) for source in SOURCES):
            missing.append(name)
    if missing:
        errors.append(_not_found(missing, task.root, where))
    if errors:
        raise gravest(errors)
    if not found:
        raise ConfigError(f"{where}.sets leaves out every set: keep one of {', '.join(SETS)}.")
    return found


def _configure(name: str, given: ImageNetSetConfig | None, task: RobustnessTaskConfig) -> ZeroShotTaskConfig:
    """Return the task of one set; without a source if it was not found."""
    own = (
        {}
        if given is None
        else {key: value for key in ImageNetSetConfig.model_fields if (value := getattr(given, key)) is not None}
    )
    config = ZeroShotTaskConfig(**{"classes": SETS[name].classes, "templates": task.templates, **own})
    if not any(getattr(config, source) for source in SOURCES) and task.root is not None:
        folder = _find(Path(task.root).expanduser(), name)
        config.root = str(folder) if folder is not None else None
    return config


def _not_found(names: list[str], root: str | None, where: str) -> ConfigError:
    own, none = f"{where}.sets.{names[0]}.root=DIR", f"{where}.sets.{names[0]}=null"
    if root is None:
        return ConfigError(
            f"{where}.root has no value: give the folder that holds {', '.join(names)}; or a set's own folder, as {own}; or "
            f"leave a set out, as {none}."
        )
    looked = "; ".join(f"{name}, as {' or '.join(SETS[name].folders)}" for name in names)
    return ConfigError(
        f"{where}.root={root}: not found there: {looked}. Give a set's own folder, as {own}, or leave it out, as {none}."
    )


def weights_file(weights: str, where: str) -> Path | None:
    """The file that `baseline_weights` names; None for torchvision's name of published weights.

    Raises:
        ConfigError: no such file.
    """
    path = Path(weights).expanduser()
    if path.suffix not in WEIGHTS_SUFFIXES and not path.is_file():
        return None
    if not path.is_file():
        raise ConfigError(f"{where}.baseline_weights={weights}: no such file.")
    return path


def _find(root: Path, name: str) -> Path | None:
    for candidate in SETS[name].folders:
        folder: Path | None = root
        for part in candidate.split("/"):
            folder = _child(folder, part) if folder is not None else None
        if folder is not None:
            return folder
    return None


def _child(folder: Path, name: str) -> Path | None:
    """The folder of that name, whatever its case, with `_` or `-`."""
    if not folder.is_dir():
        return None
    matching = (child for child in sorted(folder.iterdir()) if child.name.lower().replace("_", "-") == name)
    return next((child for child in matching if child.is_dir()), None)
