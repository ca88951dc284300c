"""What scoring a task yields: numbers, how they were made, and what a page about them shows."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from clip_exp.data.pictures import Pictures


@dataclass(frozen=True)
class Classified:
    """Every picture of a classification, with its best classes."""

    pictures: Pictures
    kept: np.ndarray  # int64 [N], which of `pictures` the rows are
    labels: np.ndarray  # int64 [N], position in `class_names`
    best: np.ndarray  # int64 [N, K], best first; K = 5, or all classes if they are fewer; -1 where no class got a vote
    probabilities: np.ndarray  # float32 [N, K], of `best`, among all classes
    class_names: list[str]
    keys: list[str | None]  # folder or label of each class; None: the data lacks it


@dataclass(frozen=True)
class Query:
    """A picture with the captions that it found, or a caption with the pictures."""

    query: int
    found: list[int]  # best first
    scores: list[float]  # cosines
    right: list[bool]
    rank: int  # place of the first right one, 1 is best


@dataclass(frozen=True)
class Retrieved:
    """A few queries of a retrieval, spread evenly over the set. Pictures are positions in `pictures`, captions in `captions`."""

    pictures: Pictures
    captions: list[str]
    image_to_text: list[Query]
    text_to_image: list[Query]


@dataclass(frozen=True)
class Compared:
    """The same sets scored with several models."""

    sets: list[str]
    top1: dict[str, list[float | None]]  # model: a fraction per set; None where it has none


@dataclass(frozen=True)
class TensorFile:
    """What `eval/<task>.<name>.safetensors` holds, for use elsewhere."""

    tensors: dict[str, np.ndarray]
    metadata: dict[str, str]


@dataclass(frozen=True)
class Result:
    metrics: dict[str, float]  # shares are fractions
    protocol: dict[str, Any]  # JSON values
    details: Classified | Retrieved | Compared | None = None  # on rank 0 only
    files: dict[str, TensorFile] = field(default_factory=dict)  # by name; on rank 0 only
