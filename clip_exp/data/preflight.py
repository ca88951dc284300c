"""The data of a run before anything is trained: its keys, its tables, and whether their pictures are where they are looked for. No torch."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from clip_exp.config.data_schema import AugmentationConfig, DataConfig
from clip_exp.config.ranges import INFINITY, range_problems
from clip_exp.config.schema import TrainConfig
from clip_exp.data.files import (
    NO_SUCH_FILE,
    OUTSIDE_ROOT,
    TOO_MANY_BYTES,
    BadImage,
    ImageLimits,
    check_formats,
    kind_of,
)
from clip_exp.data.fingerprint import describe
from clip_exp.data.generated import count_rows
from clip_exp.data.pictures import label_of_images
from clip_exp.data.stream import INDEX, OpenSource, SourceSpec, open_sources, parse
from clip_exp.data.tables.filters import parse as parse_filter
from clip_exp.data.tables.open import expand, open_configured
from clip_exp.data.tables.table import PairTable, bad_rows
from clip_exp.errors import ConfigError, DataError

TRIED = 20  # pictures of a table


def check_data(data: DataConfig) -> Iterator[str]:
    """What is wrong with the keys of `data`, and with the files that they name; nothing is opened."""
    if data.generate is None and not data.train:
        yield "data.train has no value: give a table of image-text pairs (data.train=pairs.csv)."
    if data.generate is not None and (data.train or data.val):
        yield "data.generate and data.train exclude each other: use data=csv for your own tables."
    try:
        specs = parse(data.train)
    except ConfigError as error:
        specs = []
        yield from str(error).splitlines()
    for spec in specs:
        yield from _check_source(spec, data)
    yield from _check_val(data.val)
    if data.image_root is not None and not Path(data.image_root).is_dir():
        yield f"data.image_root={data.image_root} is not a folder."
    if data.filter is not None:
        yield from _check_filter(data.filter)
    yield from _check_numbers(data)
    yield from augmentation_problems(data.augmentation)
    yield from check_formats(data.image_formats)
    if not data.templates or any("{}" not in template for template in data.templates):
        yield f"data.templates={data.templates}: there must be one, and every one needs a {{}} for the class name."


class RunTables(NamedTuple):
    """The opened tables of a run; those of generated data are not made yet."""

    rows: int  # samples of an epoch
    sources: Sequence[OpenSource] = ()
    val: PairTable | None = None

    def describe(self, config: DataConfig) -> dict[str, Any] | None:
        """Return what the run's record says of its data, see `data.fingerprint.describe`; None of generated data."""
        return describe(self.sources, self.val, config) if self.sources else None


def check_tables(config: TrainConfig) -> RunTables:
    """Open the tables of a run, whose indexes are built where they are not.

    Raises:
        DataError: a table cannot be read, more of its rows are bad than `data.max_bad_fraction`, more of its captions are empty than
            `data.max_empty_caption_fraction`, none of its pictures can be read, or a picture of `data.val` has several labels.
        ConfigError: see `open_sources`.
    """
    data = config.data
    if data.generate is not None:
        rows = count_rows(data.generate)
        return RunTables(min(rows, data.max_rows or rows))
    index_dir = Path(config.output_dir) / INDEX
    sources = open_sources(data, index_dir)
    val = None
    if data.val is not None:
        val = open_configured(data, data.val, label_key=data.label_key, index_dir=index_dir)
        if data.label_key is not None:
            label_of_images(val)
    tables = [("data.train", source.table) for source in sources] + ([] if val is None else [("data.val", val)])
    problems = [
        problem
        for key, table in tables
        for problem in (
            *_check_bad_rows(key, table, data),
            *_check_captions(key, table, data),
            *_check_pictures(key, table, ImageLimits.of(data)),
        )
    ]
    if problems:
        raise DataError("\n".join(problems))
    return RunTables(sum(len(source.rows) for source in sources), sources, val)


def _check_numbers(data: DataConfig) -> Iterator[str]:
    ranges = {
        "data.max_rows": (data.max_rows, 1, INFINITY),
        "data.num_workers": (data.num_workers, 0, 4096),
        "data.max_bad_fraction": (data.max_bad_fraction, 0, 1),
        "data.max_empty_caption_fraction": (data.max_empty_caption_fraction, 0, 1),
        "data.max_image_pixels": (data.max_image_pixels, 1, INFINITY),
        "data.max_image_bytes": (data.max_image_bytes, 1, INFINITY),
        "data.shuffle_block": (data.shuffle_block, 1, INFINITY),
        "data.shuffle_window": (data.shuffle_window, 1, INFINITY),
    }
    yield from range_problems(ranges)


def augmentation_problems(augmentation: AugmentationConfig) -> Iterator[str]:
    """What makes an augmentation impossible, a line each."""
    for key in ("horizontal_flip", "color_jitter_prob", "gray_scale_prob", "gaussian_blur_prob"):
        probability = getattr(augmentation, key)
        if not 0 <= probability <= 1:
            yield f"data.augmentation.{key}={probability} must be a probability, from 0 to 1."
    yield from _augmentation_bounds("scale", augmentation.scale, 1.0)
    yield from _augmentation_bounds("ratio", augmentation.ratio, math.inf)
    yield from _augmentation_bounds("gaussian_blur_sigma", augmentation.gaussian_blur_sigma, math.inf)
    jitter = augmentation.color_jitter
    if jitter is not None and not (
        len(jitter) == 4 and all(0 <= strength < math.inf for strength in jitter) and jitter[3] <= 0.5
    ):
        yield (
            f"data.augmentation.color_jitter={jitter} must be four strengths from 0, of brightness, contrast, saturation and hue, the last "
            "at most 0.5; or null."
        )


def _augmentation_bounds(key: str, bounds: list[float], most: float) -> Iterator[str]:
    if len(bounds) != 2 or not 0 < bounds[0] <= bounds[1] < math.inf or bounds[1] > most:
        at_most = f", at most {most:g}" if most < math.inf else ""
        yield f"data.augmentation.{key}={bounds} must be two positive numbers, the smaller first{at_most}."


def _check_source(spec: SourceSpec, data: DataConfig) -> Iterator[str]:
    yield from _check_files("data.train", list(spec.paths))
    root, condition = spec.reading.get("image_root"), spec.reading.get("filter")
    if root is not None and not Path(root).is_dir():
        yield f"data.train: image_root={root} of {spec.paths[0]} is not a folder."
    if condition is not None:
        yield from _check_filter(condition)


def _check_val(val: Any) -> Iterator[str]:
    paths = val if isinstance(val, list) else [val] if val is not None else []
    if any(not isinstance(path, str | Path) for path in paths):
        yield f"data.val={val} must be a table or a list of tables: only data.train is mixed from sources."
    elif paths:
        yield from _check_files("data.val", paths)


def _check_files(key: str, paths: list[Any]) -> Iterator[str]:
    try:
        expand(paths)
    except ConfigError as error:
        yield from (f"{key}: {problem}" for problem in str(error).splitlines())


def _check_filter(condition: str) -> Iterator[str]:
    try:
        parse_filter(condition)
    except ConfigError as error:
        yield str(error)


def _check_bad_rows(key: str, table: PairTable, data: DataConfig) -> Iterator[str]:
    """Mostly a wrong separator, encoding or column, where most rows are bad."""
    seen = sum(part.seen for part in table.parts)
    if table.skipped > data.max_bad_fraction * seen:
        listed = ", ".join(f"{count:,} {reason}" for reason, count in bad_rows(table.parts).most_common(3))
        yield (
            f"{key}: {table.skipped:,} of {seen:,} rows of {table.parts[0].file} are bad ({listed}), more than "
            f"data.max_bad_fraction={data.max_bad_fraction:g}. Repair them (clip-exp check-data lists them), or allow more to be bad."
        )


def _check_captions(key: str, table: PairTable, data: DataConfig) -> Iterator[str]:
    """Mostly a wrong column, or captions that were never written."""
    if table.empty_captions > data.max_empty_caption_fraction * len(table):
        yield (
            f"{key}: {table.empty_captions:,} of {len(table):,} captions of {table.parts[0].file} are empty or blank, more than "
            f"data.max_empty_caption_fraction={data.max_empty_caption_fraction:g}. Is data.caption_key the right column? Write captions, "
            "leave these rows out (data.filter), or allow them: data.max_empty_caption_fraction=1."
        )


def _check_pictures(key: str, table: PairTable, limits: ImageLimits) -> Iterator[str]:
    """A wrong image root, told at the start. A table of which only some pictures are missing trains without them."""
    rows = np.unique(np.linspace(0, len(table) - 1, TRIED).astype(int)).tolist()
    reasons: list[str] = []
    for row in rows:
        try:
            table.read_picture(row, limits)
            return
        except BadImage as error:
            reasons.append(str(error))
    ((kind, _),) = Counter(map(kind_of, reasons)).most_common(1)
    yield (
        f"{key}: none of {len(rows)} pictures from all over {table.parts[0].file} can be read; the first is "
        f"{table.image_path(rows[0])} ({table.where(rows[0])}): {reasons[0]}. {_remedy(kind, table, table.path(rows[0]))}"
    )


def _remedy(kind: str, table: PairTable, path: str) -> str:
    if kind == OUTSIDE_ROOT:
        return f"The root is now {table.root}."
    if kind == NO_SUCH_FILE and "://" in path:
        return "Pictures are read from files, not from addresses: fetch them first (img2dataset makes shards of such a table)."
    if kind == NO_SUCH_FILE and "\\" in path:
        return "Paths are written with slashes, not with backslashes."
    if kind == NO_SUCH_FILE and table.members is None:
        return f"Relative paths start from {table.root}: set data.image_root."
    if kind == TOO_MANY_BYTES:
        return "Raise data.max_image_bytes, or make them smaller."
    return "Make the shards anew." if table.members is not None else "Repair them."
