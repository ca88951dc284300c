"""The types and documentation of evaluations: which model, which tasks, on which labelled pictures or pairs."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from clip_exp.config.data_schema import GenerateConfig, OnBadImage, OnBadRow
from clip_exp.config.missing import MISSING
from clip_exp.config.model_schema import ModelConfig


class TaskKind(StrEnum):
    auto = "auto"
    zero_shot = "zero_shot"
    retrieval = "retrieval"
    linear_probe = "linear_probe"
    knn = "knn"
    robustness = "robustness"


@dataclass
class ModelChoice:
    """Which model."""

    run: str | None = None  # a run folder; exactly one of run, ckpt, and model with pretrained
    ckpt: str | None = None  # a checkpoint folder, or its model.safetensors
    model: ModelConfig | None = None
    # Weights for `model`: a tag, hf-hub:org/name, a file or a folder; without `model` where they tell it themselves.
    pretrained: str | None = None
    ema: bool = False  # the averaged weights of the checkpoint instead of the raw ones
    wise_ft: float | None = None  # share of the run's weights, the rest from its start (Wortsman et al. 2022)


@dataclass
class SubjectConfig(ModelChoice):
    """Which model, and how it sees pictures: what every command has that runs one."""

    accelerator: str = "auto"  # auto, cpu, gpu
    precision: str = "32-true"
    batch_size: int = 64  # pictures per forward pass
    num_workers: int | None = None  # processes that decode images; null: as `data.num_workers` of a training
    on_bad_image: OnBadImage = OnBadImage.error  # `replace` leaves the picture out and counts it
    max_image_pixels: int = 200_000_000


@dataclass
class LabeledDataConfig:
    """Labelled pictures, from exactly one of `root`, `table`, `generate` and `torchvision`."""

    root: str | None = None  # folder with one folder of pictures per class, or with flat pictures and `ground_truth`
    ground_truth: str | None = (
        None  # labels of flat pictures: ImageNet's devkit (folder or archive), or a file with a label per line
    )
    table: Any = None  # a table with `image_key` and `label_key`, shards, a pattern, or a list of them
    generate: GenerateConfig | None = None  # a data set that clip_exp makes
    torchvision: str | None = None  # a class of torchvision.datasets, such as CIFAR10; `root` is where it lies
    split: str | None = None  # of `generate` and `torchvision`; null: the held-out one
    download: bool = False  # let torchvision fetch what is missing
    image_root: str | None = None
    allow_outside_root: bool = False  # read images of a table whose relative path leaves `image_root` by `..`
    image_key: str = "filepath"
    label_key: str = "label"
    separator: str = "auto"
    encoding: str = "auto"
    on_bad_row: OnBadRow = OnBadRow.error  # of a table; `skip` leaves the row out and counts it
    filter: str | None = None  # which rows of a table are used, by their columns
    classes: Any = "labels"  # labels (the data's own names), imagenet, imagenet_a, imagenet_r, objectnet, a list, a mapping, or a file


@dataclass
class AutoTaskConfig:
    """What the run validated on: retrieval on `data.val`, and zero-shot classification where it has labels."""

    kind: TaskKind = TaskKind.auto


@dataclass
class ZeroShotTaskConfig(LabeledDataConfig):
    """Zero-shot classification: each class is the average of its name in every template."""

    kind: TaskKind = TaskKind.zero_shot
    templates: Any = "openai"  # openai (80), simple (7), a list, or a file with one template per line


@dataclass
class RetrievalTaskConfig:
    """Recall@k between pictures and their captions, both ways; any of a picture's captions is a hit."""

    kind: TaskKind = TaskKind.retrieval
    table: Any = MISSING  # a table with `image_key` and `caption_key`, shards, a pattern, or a list of them
    image_root: str | None = None
    allow_outside_root: bool = False  # read images of a table whose relative path leaves `image_root` by `..`
    image_key: str = "filepath"
    caption_key: str = "title"
    separator: str = "auto"
    encoding: str = "auto"
    on_bad_row: OnBadRow = OnBadRow.error  # of a table; `skip` leaves the row out and counts it
    filter: str | None = None  # which rows of a table are used, by their columns


@dataclass
class LinearProbeTaskConfig(LabeledDataConfig):
    """Logistic regression on frozen features, fitted on `train`, scored on the task's own pictures."""

    kind: TaskKind = TaskKind.linear_probe
    train: LabeledDataConfig = field(default_factory=LabeledDataConfig)
    c: list[float] | None = None  # inverse regularisation to choose from; null: the CLIP paper's search, 1e-6 to 1e6
    val_fraction: float = 0.2  # share of `train` that chooses
    max_iter: int = 1000
    seed: int = 0  # of the choice of that share


@dataclass
class KNNTaskConfig(LabeledDataConfig):
    """Vote of the k nearest pictures of `train` by cosine."""

    kind: TaskKind = TaskKind.knn
    train: LabeledDataConfig = field(default_factory=LabeledDataConfig)
    k: int = 20
    temperature: float = 0.07  # a neighbour's vote weighs exp(cosine / temperature)


@dataclass
class RobustnessTaskConfig:
    """Zero-shot on ImageNet and its five shifted versions, beside a supervised network (CLIP paper, figure 13)."""

    kind: TaskKind = TaskKind.robustness
    root: str | None = None  # folder that holds the sets under their usual names
    sets: dict[str, Any] = field(default_factory=dict)  # name: the keys of a zero_shot task
    templates: Any = "openai"
    baseline: str | None = "resnet101"  # a classifier of torchvision.models trained on ImageNet-1k; null: none
    baseline_weights: str = "IMAGENET1K_V1"  # torchvision's name for its weights, or a file


@dataclass
class EvaluateConfig(SubjectConfig):
    task: dict[str, Any] = field(default_factory=dict)  # name: a task, typed by its `kind`
    name: str | None = None  # of the evaluation's folder; null: the run's or the model's
    output_dir: str = "outputs"
    devices: Any = (
        "auto"  # processes to share the pictures: auto (1 on CPU, all GPUs), a number, or a list of GPU indices
    )
    cache_gb: float = 10.0  # most disk space for features and classifiers below <output_dir>/cache; 0: keep none
