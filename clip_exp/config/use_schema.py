"""The types and documentation of the commands that put a model to work: predict, rank, search, export; and of models."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from clip_exp.config.data_schema import OnBadImage
from clip_exp.config.evaluation_schema import ModelChoice, SubjectConfig


class OutputFormat(StrEnum):
    table = "table"
    json = "json"
    csv = "csv"


class ExportFormat(StrEnum):
    """Whose files an export writes."""

    open_clip = "open_clip"
    huggingface = "huggingface"
    safetensors = "safetensors"
    onnx = "onnx"


@dataclass
class OutputConfig:
    """Where a result goes."""

    format: OutputFormat | None = None  # null: by the ending of `output`, else a table
    output: str | None = None  # a file, replaced if it exists; null: the terminal


@dataclass
class UseConfig(SubjectConfig, OutputConfig):
    """What predict, rank and search share; a picture is a file, or a video by frames spread evenly over it."""

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
    allow_outside_root: bool = False  # index images of the table whose relative path leaves `image_root` by `..`
    image_key: str = "filepath"
    separator: str = "auto"
    encoding: str = "auto"
    text: Any = None  # the question: a text, or a list of texts
    image: Any = None  # or a picture or video, or a list
    top: int = 10  # answers
    frames: int | None = None  # null: as the index has it; 8 for a new one
    on_bad_image: OnBadImage = OnBadImage.replace


@dataclass
class ExportConfig(ModelChoice):
    """A folder that another library loads the model from."""

    format: ExportFormat = ExportFormat.open_clip
    output: str | None = None  # the folder; a new or empty one
    overwrite: bool = False  # replace what is there


@dataclass
class ModelsConfig(OutputConfig):
    """The models that there are, and the weights that are published for them."""

    name: str | None = None  # one of them, with all that is known of its weights; null: all of clip_exp's
    all: bool = False  # open_clip's other configurations too
