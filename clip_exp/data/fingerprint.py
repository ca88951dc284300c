"""What tells the data of a run from other data, and in what it differs later.

A checkpoint keeps the fingerprint of the tables: what the stream and the validation depend on beside the seed. Images are not part of
it: one that was exchanged or repaired changes neither the order nor the captions. Nor is how a file is written, where it gives the
same rows. A run's record keeps the same and hashes of a few images: equal tables next to other images are other data.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from clip_exp.config.data import DataConfig
from clip_exp.data.files import BadImage, ImageLimits
from clip_exp.data.stream import OpenSource, blocks_of, configured
from clip_exp.data.tables.table import PairTable

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
                "pictures": source.rows.pictures,  # with another image root, equal paths may be different ones
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
        before_pictures = old.get("pictures", source["pictures"])
        if not found and source["pictures"] != before_pictures:
            found.append(f"{first} has {source['pictures']:,} distinct pictures instead of {before_pictures:,}")
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
            content: bytes | bytearray = table.read_picture(row, small)
        except BadImage as error:  # which has the size of an image that is too large
            content = str(error).encode()
        yield hashlib.sha256(content).hexdigest()[:16]
