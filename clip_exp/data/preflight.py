"""The data of a run before anything is trained: its files, its tables, and whether their images are where they are looked for. No torch."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from clip_exp.config.data import DataConfig
from clip_exp.config.training import TrainConfig
from clip_exp.data.files import (
    NO_SUCH_FILE,
    OUTSIDE_ROOT,
    TOO_MANY_BYTES,
    BadImage,
    ImageLimits,
    check_formats,
    kind_of,
)
from clip_exp.data.generated import count_rows
from clip_exp.data.image_sets import label_of_images
from clip_exp.data.stream import INDEX, OpenSource, Tables, blocks_of, configured, open_tables
from clip_exp.data.tables.filters import parse as parse_filter
from clip_exp.data.tables.open import expand
from clip_exp.data.tables.table import PairTable, bad_rows
from clip_exp.errors import ConfigError, DataError

TRIED = 20  # images of a table


def check_files(data: DataConfig) -> Iterator[str]:
    """Yield what is wrong with the files, filters and formats that `data` names; nothing is opened."""
    for source in data.sources:
        yield from _check_files("data.train", source.paths)
        if source.image_root is not None and not Path(source.image_root).is_dir():
            yield f"data.train: image_root={source.image_root} of {source.paths[0]} is not a folder."
        if source.filter is not None:
            yield from _check_filter(source.filter)
    if data.val:
        yield from _check_files("data.val", [data.val] if isinstance(data.val, str) else data.val)
    if data.image_root is not None and not Path(data.image_root).is_dir():
        yield f"data.image_root={data.image_root} is not a folder."
    if data.filter is not None:
        yield from _check_filter(data.filter)
    yield from check_formats(data.image_formats)


class RunTables(NamedTuple):
    """The opened tables of a run; those of generated data are not made yet."""

    rows: int  # samples of an epoch
    opened: Tables | None = None

    def describe(self, config: DataConfig) -> dict[str, Any] | None:
        """Return what the run's record says of its data, see `data.fingerprint.describe`; None of generated data."""
        return describe(*self.opened, config) if self.opened is not None else None


def check_tables(config: TrainConfig) -> RunTables:
    """Open the tables of a run, whose indexes are built where they are not.

    Raises:
        DataError: a table cannot be read, more of its rows are bad than `data.max_bad_fraction`, more of its captions are empty than
            `data.max_empty_caption_fraction`, none of its images can be read, or an image of `data.val` has several labels.
        ConfigError: see `open_sources`.
    """
    data = config.data
    if data.generate is not None:
        rows = count_rows(data.generate)
        return RunTables(min(rows, data.max_rows or rows))
    opened = open_tables(data, Path(config.output_dir) / INDEX)
    sources, val = opened
    if val is not None and data.label_key is not None:
        label_of_images(val)
    tables = [("data.train", source.table) for source in sources] + ([] if val is None else [("data.val", val)])
    problems = [
        problem
        for key, table in tables
        for problem in (*_check_rows(key, table, data), *_check_images(key, table, ImageLimits.of(data)))
    ]
    if problems:
        raise DataError("\n".join(problems))
    return RunTables(sum(len(source.rows) for source in sources), opened)


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


def _check_rows(key: str, table: PairTable, data: DataConfig) -> Iterator[str]:
    seen = sum(part.seen for part in table.parts)
    if table.skipped > data.max_bad_fraction * seen:  # mostly a wrong separator, encoding or column
        listed = ", ".join(f"{count:,} {reason}" for reason, count in bad_rows(table.parts).most_common(3))
        yield (
            f"{key}: {table.skipped:,} of {seen:,} rows of {table.parts[0].path} are bad ({listed}), more than "
            f"data.max_bad_fraction={data.max_bad_fraction:g}. Repair them (clip-exp check-data lists them), or allow more to be bad."
        )
    # Mostly a wrong column, or captions that were never written.
    if table.empty_captions > data.max_empty_caption_fraction * len(table):
        yield (
            f"{key}: {table.empty_captions:,} of {len(table):,} captions of {table.parts[0].path} are empty or blank, more than "
            f"data.max_empty_caption_fraction={data.max_empty_caption_fraction:g}. Is data.caption_key the right column? Write captions, "
            "leave these rows out (data.filter), or allow them: data.max_empty_caption_fraction=1."
        )


def _check_images(key: str, table: PairTable, limits: ImageLimits) -> Iterator[str]:
    """A wrong image root, told at the start. A table of which only some images are missing trains without them."""
    rows = np.unique(np.linspace(0, len(table) - 1, TRIED).astype(int)).tolist()
    reasons: list[str] = []
    for row in rows:
        try:
            table.read_image(row, limits)
            return
        except BadImage as error:
            reasons.append(str(error))
    ((kind, _),) = Counter(map(kind_of, reasons)).most_common(1)
    yield (
        f"{key}: none of {len(rows)} images from all over {table.parts[0].path} can be read; the first is "
        f"{table.image_path(rows[0])} ({table.where(rows[0])}): {reasons[0]}. {_remedy(kind, table, table.path(rows[0]))}"
    )


def _remedy(kind: str, table: PairTable, path: str) -> str:
    if kind == OUTSIDE_ROOT:
        return f"The root is now {table.root}."
    if kind == NO_SUCH_FILE and "://" in path:
        return "Images are read from files, not from addresses: fetch them first (img2dataset makes shards of such a table)."
    if kind == NO_SUCH_FILE and "\\" in path:
        return "Paths are written with slashes, not with backslashes."
    if kind == NO_SUCH_FILE and table.members is None:
        return f"Relative paths start from {table.root}: set data.image_root."
    if kind == TOO_MANY_BYTES:
        return "Raise data.max_image_bytes, or make them smaller."
    return "Make the shards anew." if table.members is not None else "Repair them."


SAMPLED = 32  # images of which the record has hashes
SAMPLED_BYTES = 4 << 20  # of a larger image the size alone is compared
MANY_FILES = 32  # of a table, which the record has one by one
VAL = "val"  # key of the validation table's files


def fingerprint(sources: Sequence[OpenSource], val: PairTable | None, config: DataConfig) -> dict[str, Any]:
    """Return plain values that are equal where the stream and the validation rows are.

    Args:
        sources: of the training stream.
        val: the table of `data.val`.
        config: the run's.
    """
    described = []
    for source in sources:
        blocks = blocks_of(config, source.table)
        described.append(
            {
                "files": source.table.fingerprint(),
                "weight": source.spec.weight,
                "filter": configured(source.spec, config).filter,
                "shuffle": "full" if blocks is None else f"{blocks.window} blocks of {blocks.rows} rows",
                "images": source.rows.images,  # with another image root, equal paths may be different ones
            }
        )
    return {
        "data.captions": config.captions.value,
        "data.max_rows": config.max_rows,
        "sources": described,
        VAL: None if val is None else val.fingerprint(),
    }


def describe(sources: Sequence[OpenSource], val: PairTable | None, config: DataConfig) -> dict[str, Any]:
    """Return what a run's record says of its data: the fingerprint, in brief where there are many files, and hashes of a few images.

    Args: see `fingerprint`.
    """
    described = fingerprint(sources, val, config)
    for source in described["sources"]:
        source["files"] = _brief(source["files"])
    if val is not None:
        described[VAL] = _brief(described[VAL])
    tables = [source.table for source in sources] + ([] if val is None else [val])
    count, limits = max(1, SAMPLED // len(tables)), ImageLimits.of(config)
    return {**described, "images": [digest for table in tables for digest in _sample(table, count, limits)]}


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return how two fingerprints, or what two records have of them, differ; each names the file or the key and begins a sentence."""
    found = stream_changes(before, now)
    if VAL not in before or before[VAL] == now[VAL]:  # older versions did not keep it
        return found
    if before[VAL] is None or now[VAL] is None:
        return [*found, f"data.val is {'no longer' if now[VAL] is None else 'now'} given"]
    return [*found, *(f"data.val: {change}" for change in _file_changes(before[VAL], now[VAL]))]


def stream_changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return `changes` of the training data alone."""
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
    """Return a value as people type it: a weight of 3.0 is 3."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def image_changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return how the images differ in what two records have of them, where their tables are equal."""
    changed = sum(old != new for old, new in zip(before["images"], now["images"], strict=False))
    return [f"{changed} of {len(now['images'])} sampled images have other content"] if changed else []


def _file_changes(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    for name in before:
        if name not in now:
            yield f"{name} is no longer among the files"
    for name in now:
        if name not in before:
            yield f"{name} was not among the files"
    if before.keys() == now.keys() and list(before) != list(now):
        yield f"the files are in another order, {next(iter(now))} first"
    for name in filter(before.__contains__, now):
        old, new = before[name], now[name]
        if old["rows"] != new["rows"]:
            yield f"{name} has {new['rows']:,} rows instead of {old['rows']:,}"
        elif old["digest"] != new["digest"]:
            size = "" if old["bytes"] == new["bytes"] else f" ({new['bytes']:,} bytes instead of {old['bytes']:,})"
            yield f"{name} has other content in its {new['rows']:,} rows{size}"


def _brief(files: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the files of a table as one where they are many."""
    if len(files) <= MANY_FILES:
        return files
    first, *_, last = files
    rows, size = (sum(file[key] for file in files.values()) for key in ("rows", "bytes"))
    digest = hashlib.sha256(json.dumps([(name, file["digest"]) for name, file in files.items()]).encode()).hexdigest()
    return {f"{len(files):,} files from {first} to {last}": {"rows": rows, "bytes": size, "digest": digest}}


def _sample(table: PairTable, count: int, limits: ImageLimits) -> Iterator[str]:
    """Yield hashes of the bytes of `count` images from all over a table; of one that cannot be read, of the reason."""
    small = replace(limits, max_bytes=min(limits.max_bytes, SAMPLED_BYTES))
    for row in np.unique(np.linspace(0, len(table) - 1, count).astype(int)).tolist():
        try:
            content: bytes | bytearray = table.read_image(row, small)
        except BadImage as error:  # which has the size of an image that is too large
            content = str(error).encode()
        yield hashlib.sha256(content).hexdigest()[:16]
