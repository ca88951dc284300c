"""Checks of the data before a run starts, and the fingerprint by which a resumed run detects changed data.

Does not import torch.
"""

import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from clip_exp.config.data import CustomDataConfig, DataConfig, Format
from clip_exp.config.training import TrainConfig
from clip_exp.data.files import BadImage, ImageLimits, check_formats, kind_of, open_image_bytes
from clip_exp.data.generated import count_rows
from clip_exp.data.pairs import Origin, bytes_of
from clip_exp.data.stream import INDEX, Sources, blocks_of, open_all
from clip_exp.data.tables.filters import parse as parse_filter
from clip_exp.data.tables.open import expand
from clip_exp.data.tables.table import bad_rows
from clip_exp.errors import ConfigError, DataError

TRIED = 20  # images per table


def check_files(data: DataConfig) -> Iterator[str]:
    """Yield a message for each problem with the files, filters and formats that `data` names. No file is opened."""
    for key, sources in (("data.train", data.sources), ("data.val", data.val_sources)):
        for source in sources:
            yield from _check_files(key, source.paths, source.reading.get("format", data.format))
            if source.image_root is not None and not Path(source.image_root).is_dir():
                yield f"{key}: image_root={source.image_root} of {source.paths[0]} is not a directory."
            if source.filter is not None:
                yield from _check_filter(source.filter)
    if data.val_paths or not isinstance(data, CustomDataConfig):  # else these keys are arguments of the Dataset
        if data.image_root is not None and not Path(data.image_root).is_dir():
            yield f"data.image_root={data.image_root} is not a directory."
        if data.filter is not None:
            yield from _check_filter(data.filter)
    yield from check_formats(data.image_formats)


class RunTables(NamedTuple):
    """Opened data of a run. Generated data is not opened yet: it is written when training starts."""

    rows: int  # samples per epoch
    opened: Sources | None = None

    def describe(self, config: DataConfig) -> dict[str, Any] | None:
        """Return the description of the data for the run's record (see `describe`); None for generated data."""
        return describe(self.opened, config) if self.opened is not None else None


def check_tables(config: TrainConfig) -> RunTables:
    """Open the tables of a run and check them. Missing indexes are built.

    Raises:
        DataError: a table cannot be read, its fraction of bad rows exceeds `data.max_bad_fraction`, its fraction of
            empty captions exceeds `data.max_empty_caption_fraction`, none of its images can be read, or an image of
            `data.val` has several labels.
        ConfigError: see `open_all`.
    """
    data = config.data
    if data.generate is not None:
        rows = count_rows(data.generate)
        return RunTables(min(rows, data.max_rows or rows))
    opened = open_all(data, Path(config.output_dir) / INDEX)
    origins = [("data.train", source.rows.origin) for source in opened.train]
    if opened.val is not None:
        origins += [("data.val", origin) for origin in opened.val.origins]
    problems = [problem for key, origin in origins for problem in check_origin(key, origin, data)]
    if problems:
        raise DataError("\n".join(problems))
    return RunTables(sum(len(source.rows) for source in opened.train), opened)


def check_origin(key: str, origin: Origin, data: DataConfig) -> Iterator[str]:
    """Yield a message if too many rows are bad, too many captions are empty, or no image can be read.

    Args:
        key: key of the data, for messages.
    """
    yield from _check_rows(key, origin, data)
    yield from _check_images(key, origin, ImageLimits.of(data))


def _check_files(key: str, paths: list[Any], layout: Format) -> Iterator[str]:
    try:
        expand(paths, layout)
    except ConfigError as error:
        yield from (f"{key}: {problem}" for problem in str(error).splitlines())


def _check_filter(condition: str) -> Iterator[str]:
    try:
        parse_filter(condition)
    except ConfigError as error:
        yield str(error)


def _check_rows(key: str, table: Origin, data: DataConfig) -> Iterator[str]:
    seen = sum(part.seen for part in table.parts)
    # Usually the cause is a wrong separator, encoding or column.
    if table.skipped > data.max_bad_fraction * seen:
        listed = ", ".join(f"{count:,} {reason}" for reason, count in bad_rows(table.parts).most_common(3))
        yield (
            f"{key}: {table.skipped:,} of {seen:,} rows of {table.name} are bad ({listed}), more than "
            f"data.max_bad_fraction={data.max_bad_fraction:g}. Repair them (clip-exp check-data lists them), or increase "
            "data.max_bad_fraction."
        )
    # Usually the cause is a wrong column, or captions that were never written.
    if table.empty_captions > data.max_empty_caption_fraction * len(table):
        yield (
            f"{key}: {table.empty_captions:,} of {len(table):,} captions of {table.name} are empty or blank, more than "
            f"data.max_empty_caption_fraction={data.max_empty_caption_fraction:g}. Check data.caption_key, add captions, remove these "
            "rows (data.filter), or allow them with data.max_empty_caption_fraction=1."
        )


def _check_images(key: str, origin: Origin, limits: ImageLimits) -> Iterator[str]:
    """Yield a message if none of some sampled images can be read, usually because of a wrong image root.

    One readable image is enough: training replaces single bad images.
    """
    rows = np.unique(np.linspace(0, len(origin) - 1, TRIED).astype(int)).tolist()
    reasons: list[str] = []
    for row in rows:
        try:
            image = origin.read_image(row, limits)
            if isinstance(image, bytearray):
                with warnings.catch_warnings():  # of Pillow, about single images
                    warnings.simplefilter("ignore")
                    open_image_bytes(image, limits)
            return
        except BadImage as error:
            reasons.append(str(error))
    ((kind, _),) = Counter(map(kind_of, reasons)).most_common(1)
    yield (
        f"{key}: none of {len(rows)} images sampled from {origin.name} can be read; the first is "
        f"{origin.location(rows[0])}: {reasons[0]}. {origin.remedy(rows[0], kind)}"
    ).rstrip()


# The fingerprint of the data, stored in checkpoints and compared when a run is resumed.

SAMPLED = 32  # images whose hashes are in the record
SAMPLED_BYTES = 4 << 20  # for larger images, only the size is compared
MANY_FILES = 32  # up to so many files of a table are recorded one by one
VAL = "val"  # key of the validation table's files


def fingerprint(opened: Sources, config: DataConfig) -> dict[str, Any]:
    """Return JSON values that are equal if and only if the training stream and the validation rows are equal.

    Args:
        opened: opened data of the run.
        config: data configuration of the run.
    """
    described = []
    for source in opened.train:
        blocks = blocks_of(config, source.rows)
        described.append(
            {
                "files": source.rows.origin.fingerprint(),
                "weight": source.weight,
                "filter": source.filter,
                "shuffle": "full" if blocks is None else f"{blocks.window} blocks of {blocks.rows} rows",
                "images": source.rows.images,  # with another image root, the number of distinct images may differ
            }
        )
    return {
        "data.captions": config.captions.value,
        "data.max_rows": config.max_rows,
        "sources": described,
        VAL: None if opened.val is None else _joined(origin.fingerprint() for origin in opened.val.origins),
    }


def _joined(fingerprints: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Return the files of several tables, whose names are made distinct."""
    joined: dict[str, Any] = {}
    for files in fingerprints:
        for name, file in files.items():
            times = sum(other.partition(" [")[0] == name for other in joined)
            joined[f"{name} [{times + 1}]" if times else name] = file
    return joined


def describe(opened: Sources, config: DataConfig) -> dict[str, Any]:
    """Return the description of the data for a run's record.

    It is the fingerprint, abbreviated for many files, and hashes of some images.

    Args: see `fingerprint`.
    """
    described = fingerprint(opened, config)
    for source in described["sources"]:
        source["files"] = _brief(source["files"])
    origins = [source.rows.origin for source in opened.train]
    if opened.val is not None:
        described[VAL] = _brief(described[VAL])
        origins += opened.val.origins
    count, limits = max(1, SAMPLED // len(origins)), ImageLimits.of(config)
    return {**described, "images": [digest for origin in origins for digest in _sample(origin, count, limits)]}


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return the differences between two fingerprints or descriptions.

    Each names the file or key and can start a sentence.
    """
    found = stream_changes(before, now)
    if VAL not in before or before[VAL] == now[VAL]:  # older versions did not store it
        return found
    if before[VAL] is None or now[VAL] is None:
        return [*found, f"data.val is {'no longer' if now[VAL] is None else 'now'} given"]
    return [*found, *(f"data.val: {change}" for change in _file_changes(before[VAL], now[VAL]))]


def stream_changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return the `changes` of the training data only."""
    found = [
        f"{key} is {now[key]} instead of {before.get(key)}"
        for key in ("data.captions", "data.max_rows")
        if now[key] != before.get(key)
    ]
    sources, earlier = now["sources"], before.get("sources", [])
    if len(sources) != len(earlier):
        return [*found, f"data.train has {len(sources)} sources instead of {len(earlier)}"]
    for source, old in zip(sources, earlier, strict=True):
        first = next(iter(source["files"]))
        which = "" if len(sources) == 1 else f" of {first}"
        found += [
            f"{name}{which} is {_typed(source[name])} instead of {_typed(old.get(name))}"
            for name in ("weight", "filter", "shuffle")
            if source[name] != old.get(name)
        ]
        found += _file_changes(old.get("files", {}), source["files"])
        before_images = old.get("images", source["images"])
        if not found and source["images"] != before_images:
            found.append(f"{first} has {source['images']:,} distinct images instead of {before_images:,}")
    return found


def _typed(value: Any) -> Any:
    """Return a value as users type it: 3 for a weight of 3.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def image_changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return the differences between the image hashes of two descriptions whose tables are equal."""
    changed = sum(old != new for old, new in zip(before["images"], now["images"], strict=False))
    return [f"{changed} of {len(now['images'])} sampled images have different content"] if changed else []


def _file_changes(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    for name in before:
        if name not in now:
            yield f"{name} is no longer among the files"
    for name in now:
        if name not in before:
            yield f"{name} was not among the files"
    if before.keys() == now.keys() and list(before) != list(now):
        yield f"the order of the files has changed, {next(iter(now))} is first"
    for name in filter(before.__contains__, now):
        old, new = before[name], now[name]
        if old["rows"] != new["rows"]:
            yield f"{name} has {new['rows']:,} rows instead of {old['rows']:,}"
        elif old["digest"] != new["digest"]:
            size = ""
            if old.get("bytes") != new.get("bytes"):  # a data set has none
                size = f" ({new['bytes']:,} bytes instead of {old['bytes']:,})"
            yield f"{name} has different content in its {new['rows']:,} rows{size}"


def _brief(files: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the files of a table, summarized as one entry if there are more than `MANY_FILES`."""
    if len(files) <= MANY_FILES:
        return files
    first, *_, last = files
    rows, size = (sum(file[key] for file in files.values()) for key in ("rows", "bytes"))
    digest = hashlib.sha256(json.dumps([(name, file["digest"]) for name, file in files.items()]).encode()).hexdigest()
    return {f"{len(files):,} files from {first} to {last}": {"rows": rows, "bytes": size, "digest": digest}}


def _sample(origin: Origin, count: int, limits: ImageLimits) -> Iterator[str]:
    """Yield hashes of the bytes of `count` images spread over a source; for an unreadable image, the hash of the reason."""
    small = replace(limits, max_bytes=min(limits.max_bytes, SAMPLED_BYTES))
    for row in np.unique(np.linspace(0, len(origin) - 1, count).astype(int)).tolist():
        try:
            content: Any = bytes_of(origin.read_image(row, small))
        except BadImage as error:  # for an image that is too large, the reason includes its size
            content = str(error).encode()
        yield hashlib.sha256(content).hexdigest()[:16]
