"""Tasks whose files are found and whose names are matched, ready for a model. No torch."""

from dataclasses import dataclass

from clip_exp.config.evaluation_schema import (
    KNNTaskConfig,
    LinearProbeTaskConfig,
    RobustnessTaskConfig,
    ZeroShotTaskConfig,
)
from clip_exp.data.pictures import Pictures
from clip_exp.evaluation.sets.labeled import LabeledImages
from clip_exp.evaluation.sets.overlap import Overlap


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
    caption_image: list[int]  # position in `pictures` of each caption's picture
    where: str
    bad_rows: int = 0  # of the table, that are left out


@dataclass(frozen=True)
class ProbeTask:
    name: str
    train: LabeledImages
    test: LabeledImages  # of the same classes
    config: LinearProbeTaskConfig
    overlap: Overlap | None  # of `test` with `train`; None: they cannot be compared


@dataclass(frozen=True)
class KNNTask:
    name: str
    train: LabeledImages
    test: LabeledImages  # of the same classes
    config: KNNTaskConfig
    overlap: Overlap | None  # of `test` with `train`; None: they cannot be compared


@dataclass(frozen=True)
class RobustnessTask:
    name: str
    sets: dict[str, ClassificationTask]
    config: RobustnessTaskConfig


Task = ClassificationTask | RetrievalTask | ProbeTask | KNNTask | RobustnessTask
