"""What a run's stream depends on beside its seed, as a checkpoint keeps it, and what is different about it later.

Pictures are not part of it: one that was exchanged or repaired changes neither the order nor the captions. Nor is how a file is
written, where it gives the same rows.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from clip_exp.config.data_schema import DataConfig
from clip_exp.data.sources import OpenSource
from clip_exp.data.stream import blocks_of


def fingerprint(sources: Sequence[OpenSource], config: DataConfig) -> dict[str, Any]:
    """Plain values that are equal where the stream is."""
    return {
        "data.captions": config.captions.value,
        "data.max_rows": config.max_rows,
        "sources": [
            {
                "files": source.table.fingerprint(),
                "weight": source.spec.weight,
                "filter": source.spec.configured(config).filter,
                "shuffle": _shuffle(config, source),
                "pictures": source.rows.pictures,  # with another image root, equal paths may be different ones
            }
            for source in sources
        ],
    }


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What is different between two fingerprints, each a sentence's beginning that names the file or the key."""
    found = [
        f"{key} is {now[key]} instead of {before.get(key)}"
        for key in now
        if key != "sources" and now[key] != before.get(key)
    ]
    sources, earlier = now["sources"], before.get("sources", [])
    if len(sources) != len(earlier):
        return [*found, f"data.train has {len(sources)} sources instead of {len(earlier)}"]
    for source, old in zip(sources, earlier, strict=True):
        first = next(iter(source["files"]))
        which = "" if len(sources) == 1 else f" of {first}"
        found += [
            f"{name}{which} is {source[name]} instead of {old.get(name)}"
            for name in ("weight", "filter", "shuffle")
            if source[name] != old.get(name)
        ]
        found += _file_changes(old.get("files", {}), source["files"])
        before_pictures = old.get("pictures", source["pictures"])
        if not found and source["pictures"] != before_pictures:
            found.append(f"{first} has {source['pictures']:,} distinct pictures instead of {before_pictures:,}")
    return found


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


def _shuffle(config: DataConfig, source: OpenSource) -> str:
    blocks = blocks_of(config, source.table)
    return "full" if blocks is None else f"{blocks.window} blocks of {blocks.rows} rows"
