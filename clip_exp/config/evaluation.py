"""The schema of an evaluation: which model, which tasks, on which labeled images or pairs."""

from collections.abc import Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from clip_exp.config.base import (
    NOT_EMPTY,
    Config,
    Count,
    Fraction,
    Index,
    Member,
    Name,
    NonNegative,
    Paths,
    PathText,
    Unused,
    must_be,
)
from clip_exp.config.data import GenerateConfig, OnBadRow
from clip_exp.config.model import ModelConfig

if TYPE_CHECKING:
    from clip_exp.config.training import TrainConfig


Accelerator = Literal["auto", "cpu", "gpu", "cuda"]
ClassNames = Annotated[
    Name | list[Name] | dict[str, Name],
    must_be(
        "labels, the name of a published list, a list, a mapping of label to name, or a file of one of these; odd names in quotes"
    ),
]

SOURCES = ("root", "table", "generate", "torchvision")  # of labeled images


class EvalOnBadImage(StrEnum):
    """Reaction to an unreadable image outside training, where no other row can replace it (`config.data.OnBadImage`)."""

    error = "error"
    skip = "skip"


# ---------------------------------------------------------------------------------------------------------- model


class ModelChoice(Config):
    """Which model."""

    run: PathText | None = Field(
        None, description="run folder, outputs/train/<name>/<time>; one of run, ckpt, and model with pretrained"
    )
    ckpt: PathText | None = Field(
        None, description="checkpoint, <run folder>/checkpoints/step-000060, or its model.safetensors"
    )
    model: ModelConfig | None = Field(None, description="model of those weights, by its name: model=vit_b32")
    pretrained: str | None = Field(
        None,
        description="weights for model=…: a tag of `clip-exp models`, hf-hub:org/name, a file or a folder; alone where they name their model",
    )
    pretrained_prefix: str | None = Field(
        None,
        description="which weights of the file, where several fit the model, such as a student and a teacher: a key of the file, a prefix of names, or both with a dot between them",
    )
    ema: bool = Field(False, description="the averaged weights of the checkpoint instead of the raw ones")
    wise_ft: Fraction | None = Field(
        None,
        description="fraction of the run's weights, the rest from what it started from (Wortsman et al. 2022); null: all",
    )

    unused: ClassVar[tuple[Unused, ...]] = (
        Unused("pretrained_prefix", lambda c: c.pretrained is None, "without pretrained"),
    )


class InferenceConfig(ModelChoice):
    """Which model, and how it sees images: what every command has that runs one."""

    accelerator: Accelerator = Field("auto", description="auto, cpu, gpu (or cuda)")
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"] = Field(
        "32-true", description="auto, 32-true, bf16-mixed or 16-mixed"
    )
    batch_size: Count = Field(64, description="images per forward pass")
    num_workers: Index | None = Field(
        None, description="processes that decode images; null: as `data.num_workers` of a training"
    )
    on_bad_image: EvalOnBadImage = Field(
        EvalOnBadImage.error, description="error, or skip: leave unreadable images out and count them"
    )
    max_image_pixels: Count = Field(200_000_000, description="pixels; larger images are refused from their header")


# ----------------------------------------------------------------------------------------------------------- data


class TableConfig(Config):
    """How a table is read."""

    image_root: PathText | None = Field(
        None, description="folder that relative image paths start from; null: the table's own folder"
    )
    allow_outside_root: bool = Field(False, description="read images whose relative path leaves `image_root` by `..`")
    image_key: str = Field("filepath", description="column of image paths")
    separator: str = Field("auto", description="auto, or one character; tab may be written \\t")
    encoding: str = Field("auto", description="auto, or Python's name of an encoding")
    on_bad_row: OnBadRow = Field(OnBadRow.error, description="error, or skip: leave bad rows out and count them")
    filter: str | None = Field(
        None, description='rows that are used, by their columns: "width >= 256 and similarity > 0.28"'
    )


class LabeledDataConfig(TableConfig):
    """Labeled images, from exactly one of `root`, `table`, `generate` and `torchvision`."""

    root: PathText | None = Field(
        None,
        description="folder with one folder of images per class, or with flat images and `ground_truth`; of torchvision's data",
    )
    ground_truth: PathText | None = Field(
        None,
        description="labels of flat images: ImageNet's devkit (folder or archive), or a file with a label per line",
    )
    table: Paths | None = Field(
        None, description="table with `image_key` and `label_key`, shards, a pattern, or a list of them"
    )
    generate: GenerateConfig | None = Field(None, description="data set that clip_exp makes")
    torchvision: str | None = Field(
        None, description="class of torchvision.datasets, such as CIFAR10; `root` is where it lies"
    )
    split: str | None = Field(None, description="of `generate` and `torchvision`; null: the held-out one")
    download: bool = Field(False, description="let torchvision fetch what is missing")
    label_key: str = Field("label", description="column of labels")
    classes: ClassNames = Field(
        "labels",
        description="labels (the data's own names), imagenet, imagenet_a, imagenet_r, objectnet, a list, a mapping of label to name, or a file",
    )

    unused: ClassVar[tuple[Unused, ...]] = (
        Unused("image_root allow_outside_root", lambda data: data.table is None, "without {at}table"),
        Unused(
            "image_key label_key separator encoding on_bad_row filter",
            lambda data: data.table is None and data.generate is None,
            "without {at}table",
        ),
        Unused(
            "ground_truth",
            lambda data: data.root is None or data.torchvision is not None or data.classes == "objectnet",
            "without flat images in {at}root",
        ),
        Unused("download", lambda data: data.torchvision is None, "without {at}torchvision"),
        Unused(
            "split",
            lambda data: data.torchvision is None and data.generate is None,
            "without {at}torchvision or {at}generate",
        ),
    )


# ---------------------------------------------------------------------------------------------------------- tasks


class Scale(StrEnum):
    """How the values of a metric are read."""

    fraction = "fraction"  # 0 to 1, higher is better
    rank = "rank"  # from 1, lower is better
    loss = "loss"  # lower is better


class TaskConfig(Member):
    """What every evaluation task has: how its data are found, and how its results are shown."""

    group: ClassVar[str] = "task"
    key: ClassVar[str] = "kind"

    kind: str

    title: ClassVar[str] = ""  # of the kind, on pages; empty: its name
    headline: ClassVar[tuple[str, ...]] = ()  # metrics that stand first where not all are shown
    # Of metrics that are not fractions, by the part of their names after the last slash.
    scales: ClassVar[dict[str, Scale]] = {}
    of_validation: ClassVar[bool] = False  # scores a run on the data that its training validates on

    @property
    def fetches(self) -> bool:
        """Whether `prepare` may download data."""
        return any(isinstance(part, LabeledDataConfig) and part.download for part in (self, *vars(self).values()))

    def prepare(self, name: str, output_dir: str, run: "TrainConfig | None" = None) -> Sequence[Any]:
        """Find files and match names, without torch; return what is to be scored (`evaluation.task.Task`).

        Args:
            name: of the task; `task.<name>` is the beginning of its keys, for messages.
            output_dir: of the command; generated data are written below it.
            run: run of the model; None: the model is no run's.
        Raises:
            ClipExpError: a value does not fit the data, or the data cannot be used.
        """
        raise NotImplementedError

    @classmethod
    def kinds(cls) -> dict[str, "type[TaskConfig]"]:
        """Return the kinds of tasks by their names, those of the user included."""
        return {model.model_fields["kind"].default: model for model in cls.members()}  # type: ignore[misc]


def _is_chosen(values: Any) -> Any:
    if isinstance(values, dict) and "kind" not in values:
        kinds = ", ".join(TaskConfig.kinds())
        raise PydanticCustomError(
            "task", "is not chosen: name it in task=[…]. A task of your own needs a kind: {kinds}", {"kinds": kinds}
        )
    return values


Tasks = dict[str, Annotated[TaskConfig, BeforeValidator(_is_chosen)]]

# ---------------------------------------------------------------------------------------------------- the command

Devices = Annotated[
    Literal["auto"] | Literal[-1] | Count | Annotated[list[Index], NOT_EMPTY],
    must_be("auto, a number above 0, or a list of distinct GPU indices"),
]


class EvaluateConfig(InferenceConfig):
    """An evaluation."""

    usage: ClassVar = """\
python evaluate.py run=DIR [task=[…]] [key=value …]        (or: clip-exp evaluate …)

Which model: run=DIR, or ckpt=PATH, or model=… pretrained=…; what to score it on: task=[imagenet,retrieval]."""

    task: Tasks = Field({}, description="tasks: task=imagenet, or several: 'task=[imagenet,retrieval]'")
    name: str | None = Field(None, description="name of the evaluation's folder; null: the run's or the model's")
    output_dir: str = Field("outputs", description="folder for evaluations, caches and generated data")
    devices: Devices = Field(
        "auto",
        description="processes to share the images: auto (1 on CPU, all GPUs), a number, or a list of GPU indices",
    )
    cache_gb: NonNegative = Field(
        10.0, description="GB of disk space for features and classifiers below <output_dir>/cache; 0: keep none"
    )

    unused: ClassVar[tuple[Unused, ...]] = (
        *InferenceConfig.unused,
        Unused(
            "model.dropout model.image.patch_dropout model.image.pretrained model.text.pretrained",
            lambda c: c.model is not None,
            "on a model that is trained already",
            typed_only=True,
        ),
    )
