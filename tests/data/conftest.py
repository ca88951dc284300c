"""Fixtures with generated images and tables."""

import csv
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clip_exp.config.data import DataConfig
from clip_exp.data.datamodule import PairsDataModule
from clip_exp.data.images import preprocessing_of
from clip_exp.models.families.clip import ViTConfig
from clip_exp.text.tokenizer import Tokenizer


def noise(seed: int, width: int = 48, height: int = 40) -> Image.Image:
    """Return a smooth random RGB image."""
    draw = np.random.default_rng(seed)
    return Image.fromarray(draw.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((width, height))


def load(file: str | Path) -> Image.Image:
    with Image.open(file) as image:
        image.load()
    return image


def write_table(file: Path, records: list[list[str]], separator: str = ",", encoding: str = "utf-8") -> Path:
    with open(file, "w", newline="", encoding=encoding) as stream:
        csv.writer(stream, delimiter=separator).writerows(records)
    return file


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Write a table of 25 rows with 23 images, JPEG and PNG. The third image has three captions, the others have one."""
    records = [["filepath", "title"]]
    for i in range(23):
        name = f"{i:02d}.{'jpg' if i % 2 else 'png'}"
        noise(i).save(tmp_path / name)
        records += [[name, f"caption {variant} of image {i}"] for variant in range(3 if i == 3 else 1)]
    return write_table(tmp_path / "pairs.csv", records)


Build = Callable[..., PairsDataModule]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """Return a function that builds a data module (`data_module`) in the test's folder."""
    return partial(data_module, tmp_path / "outputs")


def data_module(
    output_dir: Path,
    train: object,
    *,
    seed: int = 0,
    global_batch_size: int = 4,
    total_steps: int | None = 3,
    run_dir: Path | None = None,
    **values: object,
) -> PairsDataModule:
    """Build a data module with images of 16 pixels in batches of 4. Other keywords are fields of `DataConfig`."""
    config = DataConfig(name="csv", train=train, **{"num_workers": 0, **values})  # type: ignore[arg-type]
    return PairsDataModule(
        config,
        preprocessing=preprocessing_of(ViTConfig(image_size=16, patch_size=8, width=8, layers=1, heads=1)),
        tokenizer=Tokenizer(77),
        global_batch_size=global_batch_size,
        total_steps=total_steps,
        seed=seed,
        output_dir=output_dir,
        run_dir=run_dir,
    )
