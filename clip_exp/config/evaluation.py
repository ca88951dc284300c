"""Schema of an evaluation: the model, the tasks, and their labeled images or image-text pairs."""

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
    Positive,
    Unused,
    must_be,
)
from clip_exp.config.data import Format, GenerateConfig, Header, OnBadRow
from clip_exp.config.model import ModelConfig

if TYPE_CHECKING:
    from clip_exp.config.training import TrainConfig


ALLOW_TARGETS = (
    "packages or modules whose code may run if a run, checkpoint or exported model names it by _target_; code that the command itself "
    "names is always allowed"
)
# Default of `output_dir`
OUTPUTS = "outputs"
Accelerator = Literal["auto", "cpu", "gpu", "cuda"]
ClassNames = Annotated[
    Name | list[Name] | dict[str, Name],
    must_be(
        "labels, the name of a published list, a list of names, a mapping from label to name, or a file with one of these; put names "
        "with special characters in quotes"
    ),
]

# Keys of `LabeledDataConfig` that name the source of the images
SOURCES = ("root", "table", "generate", "torchvision")


class EvalOnBadImage(StrEnum):
    """Reaction to an unreadable image outside training, where no other row can replace it (`config.data.OnBadImage`)."""

    error = "error"
    skip = "skip"


# ---------------------------------------------------------------------------------------------------------- model


class ModelChoice(Config):
    """Choice of a model: a run, a checkpoint, or published weights."""

    run: PathText | None = Field(
        None,
        description="run folder, outputs/train/<name>/<time>: its best checkpoint by monitor if that was set, else its last; or the name of "
        "a run, or latest: the newest run of that name, or of all; set one of run, ckpt and pretrained",
    )
    ckpt: PathText | None = Field(
        None, description="checkpoint of a run, <run folder>/checkpoints/step-000060, or its model.safetensors"
    )
    model: ModelConfig | None = Field(
        None, description="model of the pretrained weights: model=vit_b32; null: the model that the weights name"
    )
    pretrained: str | None = Field(
        None,
        description="weights: a tag of `clip-exp models`, hf-hub:org/name, a file or a folder; needs model=… unless the weights name "
        "their model",
    )
    pretrained_prefix: str | None = Field(
        None,
        description="selects the weights in a file with several models, such as a student and a teacher: a key of the file, a prefix of "
        "names, or both joined by a dot; null: the only weights that fit",
    )
    ema: bool = Field(False, description="use the exponential moving average of the weights in the checkpoint")
    wise_ft: Fraction | None = Field(
        None,
        description="WiSE-FT (Wortsman et al. 2022): fraction of the run's weights in an average with its initial weights; null: no average",
    )
    allow_targets: list[str] = Field([], description=ALLOW_TARGETS)

    unused: ClassVar[tuple[Unused, ...]] = (
        Unused("pretrained_prefix", lambda c: c.pretrained is None, "without pretrained"),
    )

    @property
    def runs_in(self) -> str:
        """Output folder in which runs are looked for by name."""
        return OUTPUTS


class InferenceConfig(ModelChoice):
    """Base class of the commands that run a model: the model, and how it processes images."""

    accelerator: Accelerator = Field("auto", description="auto, cpu, gpu or cuda (the same as gpu)")
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"] = Field(
        "32-true",
        description="32-true, bf16-mixed or 16-mixed; auto: bf16-mixed on GPUs that support it, else 32-true",
    )
    batch_size: Count = Field(64, description="images per forward pass")
    num_workers: Index | None = Field(
        None, description="processes that decode images; null: derived from the CPU cores, as in training"
    )
    on_bad_image: EvalOnBadImage = Field(
        EvalOnBadImage.error, description="error, or skip: leave unreadable images out and count them"
    )
    max_image_pixels: Count = Field(
        200_000_000, description="maximum number of pixels of an image; larger images count as bad and are not decoded"
    )


# ----------------------------------------------------------------------------------------------------------- data


class TableConfig(Config):
    """Options for reading a table."""

    image_root: PathText | None = Field(
        None, description="folder that relative image paths refer to; null: the folder of the table"
    )
    allow_outside_root: bool = Field(
        False, description="allow relative image paths that lead out of image_root through .."
    )
    image_key: str = Field("filepath", description="name of the column with image paths")
    caption_list: bool = Field(
        False, description="read captions that are written as lists, such as ['a dog', 'a pet'], as several captions"
    )
    caption_lines: bool = Field(False, description="read each line of a caption as a caption of its own")
    table_format: Format = Field(
        Format.auto, description="layout of the table, as data.format; auto: by extension and content"
    )
    header: Header = Field(
        None,
        description="names of the columns of a text table without a header row, in order; false: no header row; null: detected",
    )
    held_out_fraction: Annotated[Positive, Field(lt=1)] | None = Field(
        None,
        description="use only the images that data.val_fraction holds out of the same table in training; null: all images",
    )
    held_out_seed: Index = Field(0, description="data.val_seed of this training")
    separator: str = Field(
        "auto", description="separator of columns in text files: one character, \\t for a tab; auto: detected"
    )
    encoding: str = Field("auto", description="encoding of text files, by Python's name; auto: detected")
    on_bad_row: OnBadRow = Field(
        OnBadRow.error,
        description="malformed rows of a table: error stops the command, skip leaves them out and counts them",
    )
    filter: str | None = Field(
        None,
        description="SQL condition on columns for rows to use: \"width >= 256 AND split = 'train'\"; null: all rows",
    )


class LabeledDataConfig(TableConfig):
    """Labeled images. Exactly one of `root`, `table`, `generate` and `torchvision` names their source; `torchvision` also needs `root`."""

    root: PathText | None = Field(
        None,
        description="folder with a folder of images per class, or with flat images (see ground_truth), or torchvision's root folder",
    )
    ground_truth: PathText | None = Field(
        None,
        description="labels of flat images in root: ImageNet's development kit (folder or archive), or a file with a label per line",
    )
    table: Paths | None = Field(
        None, description="table with the columns image_key and label_key, or shards; a glob, or a list of them"
    )
    generate: GenerateConfig | None = Field(None, description="data set that clip_exp generates; null: none")
    torchvision: str | None = Field(
        None, description="class of torchvision.datasets, such as CIFAR10, which reads its files from root"
    )
    split: str | None = Field(
        None, description="split of the data set of generate or torchvision; null: the test or validation split"
    )
    download: bool = Field(False, description="let torchvision download missing files")
    label_key: str = Field("label", description="name of the column with labels")
    classes: ClassNames = Field(
        "labels",
        description="class names: labels (the names in the data), imagenet, imagenet_a, imagenet_r, objectnet, a list, a mapping from "
        "label to name, or a file",
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
    """Range and direction of a metric's values.

    - fraction: 0 to 1, higher is better
    - rank: from 1, lower is better
    - loss: lower is better
    """

    fraction = "fraction"
    rank = "rank"
    loss = "loss"


class TaskConfig(Member):
    """Base class of evaluation tasks: how the data are found, and how the results are displayed."""

    group: ClassVar[str] = "task"
    key: ClassVar[str] = "kind"

    kind: str = Field(description="kind of task")

    # Title in reports; empty: the name of the kind
    title: ClassVar[str] = ""
    # Metrics to show where there is no space for all
    headline: ClassVar[tuple[str, ...]] = ()
    # Scales of metrics that are not fractions, by the part of the metric's name after the last slash
    scales: ClassVar[dict[str, Scale]] = {}

    @property
    def of_validation(self) -> bool:
        """True if the task evaluates a run on the validation data of its training."""
        return False

    @property
    def fetches(self) -> bool:
        """True if `prepare` may download data."""
        return any(isinstance(part, LabeledDataConfig) and part.download for part in (self, *vars(self).values()))

    def prepare(self, name: str, output_dir: str, run: "TrainConfig | None" = None) -> Sequence[Any]:
        """Return the evaluations to run (`evaluation.task.Task`), after finding files and matching names. Does not import torch.

        Args:
            name: name of the task; messages use the prefix `task.<name>` for its keys.
            output_dir: output folder of the command, where generated data are written.
            run: configuration of the run that the model is from; None if it is not from a run.

        Raises:
            ClipExpError: a value does not fit the data, or the data cannot be used.
        """
        raise NotImplementedError

    @classmethod
    def kinds(cls) -> dict[str, "type[TaskConfig]"]:
        """Return all kinds of tasks by name, including custom ones."""
        return {model.model_fields["kind"].default: model for model in cls.members()}  # type: ignore[misc]


def _is_chosen(values: Any) -> Any:
    if isinstance(values, dict) and not {"kind", "_target_"} & values.keys():
        kinds = ", ".join(TaskConfig.kinds())
        raise PydanticCustomError(
            "task", "is not selected: add it to task=[…]. A custom task needs a kind: {kinds}", {"kinds": kinds}
        )
    return values


Tasks = dict[str, Annotated[TaskConfig, BeforeValidator(_is_chosen)]]

# ---------------------------------------------------------------------------------------------------- the command

Devices = Annotated[
    Literal["auto"] | Literal[-1] | Count | Annotated[list[Index], NOT_EMPTY],
    must_be("auto, a number greater than 0, or a list of distinct GPU indices"),
]


class EvaluateConfig(InferenceConfig):
    """Configuration of an evaluation."""

    usage: ClassVar = """\
python evaluate.py run=DIR [task=[…]] [key=value …]        (or: clip-exp evaluate …)

The model: run=DIR, ckpt=PATH, or model=… pretrained=…; the tasks: task=[imagenet,retrieval]."""

    task: Tasks = Field({}, description="evaluation tasks: task=imagenet, or several: 'task=[imagenet,retrieval]'")
    name: str | None = Field(
        None, description="name of the evaluation's folder; null: the name of the run or the model"
    )
    output_dir: str = Field(OUTPUTS, description="folder for evaluations, caches and generated data")
    devices: Devices = Field(
        "auto",
        description="devices to distribute the images over: auto (all GPUs, or one CPU process), a number, or a list of GPU indices",
    )
    cache_gb: NonNegative = Field(
        10.0, description="maximum size in GB of the cache of features and classifiers, <output_dir>/cache; 0: no cache"
    )

    unused: ClassVar[tuple[Unused, ...]] = (
        *InferenceConfig.unused,
        Unused(
            "model.dropout model.image.patch_dropout model.image.pretrained model.text.pretrained",
            lambda c: c.model is not None,
            "on a trained model",
            typed_only=True,
        ),
    )

    @property
    def runs_in(self) -> str:
        return self.output_dir
