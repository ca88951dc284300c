"""Tasks whose files are found and whose names are matched, ready for a model. No torch."""

import logging
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from clip_exp.config.evaluation import KNNTaskConfig, LinearProbeTaskConfig, RobustnessTaskConfig, ZeroShotTaskConfig
from clip_exp.data.files import equal_contents
from clip_exp.data.pictures import TablePictures
from clip_exp.evaluation.sets.labeled import LabeledImages
from clip_exp.evaluation.sets.overlap import Overlap

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClassificationTask:
    name: str
    images: LabeledImages
    templates: list[str]
    config: ZeroShotTaskConfig


@dataclass(frozen=True)
class RetrievalTask:
    name: str
    pictures: TablePictures  # each once
    captions: list[str]
    caption_image: list[int]  # position in `pictures` of each caption's picture
    where: str
    about: dict[str, Any] = field(default_factory=dict)  # what else a protocol says of the data

    @cached_property
    def copies(self) -> list[list[str]]:
        """Names of pictures that are the same bytes, a list for each content that is there more than once; it may read them all."""
        groups = equal_contents([self.pictures.stored(index) for index in range(len(self.pictures))])
        named = [[self.pictures.name(index) for index in group] for group in groups]
        if named:
            log.warning(
                "%s: copies of pictures under other names: %d, such as %s; a caption of one counts as wrong for the other.",
                self.name,
                sum(len(group) - 1 for group in named),
                " and ".join(named[0][:2]),
            )
        return named


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
