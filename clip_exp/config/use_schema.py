"""The types and documentation of the commands that put a model to work: predict, rank, search."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from clip_exp.config.evaluation_schema import SubjectConfig
from clip_exp.config.schema import OnBadImage


class OutputFormat(StrEnum):
    table = "table"
    json = "json"
    csv = "csv"


@dataclass
class UseConfig(SubjectConfig):
    """What the three share; a picture is a file, or a video by frames spread evenly over it."""

    format: OutputFormat | None = None  # null: by the ending of `output`, else a table
    output: str | None = None  # a file, replaced if it exists; null: the terminal
    frames: int | None = 8  # of a video; their features are averaged


@dataclass
class PredictConfig(UseConfig):
    """Probabilities of texts for pictures."""

    images: Any = None  # file, folder (with the folders in it), glob, or a list of those
    texts: Any = None  # a list of whole texts; exactly one of texts and labels
    labels: Any = None  # class names: a list, a file (text, YAML, JSON), or imagenet (OpenAI's 1,000)
    templates: Any = None  # of labels: openai (80), simple (7), a list, or a file; null: a label is the whole text
    k: int | None = 5  # the most probable texts that are shown of each picture; null: all


@dataclass
class RankConfig(UseConfig):
    """The pictures that fit a text best."""

    text: Any = None  # one text, or a list: each is a ranking of its own
    images: Any = None  # as in predict
    keep: int | None = 32  # pictures of a ranking; null: all
    copy_to: str | None = None  # a new folder for copies of them, named in their order


@dataclass
class SearchConfig(UseConfig):
    """An index of pictures that is made once, extended, and asked by text or by picture."""

    index: str | None = None  # the file
    images: Any = None  # what to put into it: as in predict
    table: Any = None  # or a CSV with a column of paths, or a list of them
    image_root: str | None = None  # where relative paths of the table start from; null: its folder
    image_key: str = "filepath"
    separator: str = "auto"
    encoding: str = "auto"
    text: Any = None  # the question: a text, or a list of texts
    image: Any = None  # or a picture or video, or a list
    top: int = 10  # answers
    frames: int | None = None  # null: as the index has it; 8 for a new one
    on_bad_image: OnBadImage = OnBadImage.replace
