"""The types and documentation of `clip-exp check-data`."""

from dataclasses import dataclass, field
from enum import StrEnum

from clip_exp.config.data_schema import DataConfig
from clip_exp.config.missing import MISSING
from clip_exp.config.model_schema import ModelConfig


class CheckFormat(StrEnum):
    table = "table"
    json = "json"


@dataclass
class CheckDataConfig:
    """Reads a data set as training would, and tells what is wrong with it."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)  # its picture size, tokenizer and context length count
    name: str = MISSING  # of the folder: <output_dir>/check_data/<name>/<time>
    output_dir: str = "outputs"
    global_batch_size: int = 1024  # of the training that is planned: how many equal captions meet in a batch
    decode: bool = True  # false: pictures are read and their headers looked at, no pixel is decoded
    max_pictures: int | None = (
        None  # of each split: a random sample of that many is checked, the same each time; null: all
    )
    max_leakage: float | None = None  # share of `data.val`'s pictures that training may have seen; null: any
    num_workers: int | None = None  # processes that scan; null: all cores. `data.num_workers` is training's.
    format: CheckFormat = CheckFormat.table  # of what is printed
