"""Data sets that clip_exp makes itself, written once below the output folder as pictures and tables like anybody's."""

import csv
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from clip_exp.config.data_schema import DataConfig, GenerateConfig, Generator
from clip_exp.data.generators import GeneratedSample, digits, scenes
from clip_exp.errors import CheckpointError, ConfigError
from clip_exp.storage import atomic_folder, sync

DIGITS_ROWS = 1442  # of the 1,797 pictures; the others are held out
SHAPES_ROWS = 2000
_VERSION = 1  # of what the generators draw: a change makes new folders


@dataclass(frozen=True)
class GeneratedData:
    """Tables of a generated data set; pictures are relative to their folder."""

    train: Path
    val: Path


def generate(config: GenerateConfig, output_dir: Path) -> GeneratedData:
    """Write the data set to `<output_dir>/data/<its name>/`, unless it is there.

    The folder appears complete or not at all, so several processes may do this at once, and a killed one leaves no half.

    Args:
        config: what to make; the same values give the same bytes.
        output_dir: of the runs.

    Raises: ConfigError for sizes that cannot be made, CheckpointError where the folder cannot be written.
    """
    _check(config)
    folder = Path(output_dir) / "data" / _name(config)
    data = GeneratedData(folder / "train.csv", folder / "val.csv")
    if folder.is_dir():
        return data
    try:
        # Another process may be first, with the same bytes. Waiting for the disk at thousands of pictures would take long.
        with atomic_folder(folder, replace=False, durable=False) as partial:
            for split, samples in _splits(config).items():
                _write(partial, split, samples)
                sync(partial / f"{split}.csv")
    except OSError as error:
        raise CheckpointError(f"Generated data cannot be written to {folder}: {error}. Set output_dir.") from error
    return data


def readable(config: DataConfig, output_dir: Path) -> DataConfig:
    """The configuration with the tables of generated data, which are made if need be, in the place of `generate`."""
    if config.generate is None:
        return config
    made = generate(config.generate, output_dir)
    return replace(
        config, generate=None, train=str(made.train), val=str(made.val),
        image_key="filepath", caption_key="title", image_root=None,
    )  # fmt: skip


def count_rows(config: GenerateConfig) -> int:
    """Training rows of the data set, without making it."""
    if config.kind is Generator.shapes:
        return config.rows or SHAPES_ROWS
    return min(config.rows or DIGITS_ROWS, DIGITS_ROWS)


def _check(config: GenerateConfig) -> None:
    for key, rows in (("rows", config.rows), ("val_rows", config.val_rows)):
        if rows is not None and rows < 1:
            raise ConfigError(f"data.generate.{key}={rows} must be at least 1.")
    if config.kind is Generator.shapes and not 16 <= config.image_size <= 1024:
        raise ConfigError(f"data.generate.image_size={config.image_size} must be between 16 and 1024 pixels.")


def _name(config: GenerateConfig) -> str:
    parts = [config.kind.value, f"v{_VERSION}"]
    if config.rows is not None or config.val_rows is not None:
        parts.append(f"{config.rows or 'all'}x{config.val_rows or 'all'}")
    if config.kind is Generator.shapes:
        parts.append(f"{config.image_size}px")
    return "-".join([*parts, f"seed{config.seed}"])


def _splits(config: GenerateConfig) -> dict[str, Iterable[GeneratedSample]]:
    if config.kind is Generator.digits:
        train, val = digits(config.seed)
        return {"train": train[: config.rows], "val": val[: config.val_rows]}
    rows = {"train": count_rows(config), "val": config.val_rows or 400}
    return {split: scenes(split, count, config.image_size, config.seed) for split, count in rows.items()}


def _write(folder: Path, split: str, samples: Iterable[GeneratedSample]) -> None:
    (folder / split).mkdir(parents=True)
    with open(folder / f"{split}.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        for i, sample in enumerate(samples):
            if i == 0:
                table.writerow(["filepath", *sample.columns])
            path = f"{split}/{i:06d}.png"
            sample.picture.save(folder / path, compress_level=1)
            table.writerow([path, *sample.columns.values()])
