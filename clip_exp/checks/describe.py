"""Content of `report.json`, as plain values. Its keys are a stable interface."""

from collections import Counter
from typing import Any

import numpy as np

from clip_exp.checks.duplicates import Equalities, Leakage, equal_groups
from clip_exp.checks.scan import Scanned, Vocabulary
from clip_exp.checks.statistics import (
    NO_LETTERS,
    SCRIPTS,
    SPLIT_BADLY,
    counted_fraction,
    describe_images,
    english_tokens_per_character,
    equal_pairs_in_batch,
    fraction,
    linear_histogram,
    quantiles,
)
from clip_exp.config.commands import CheckDataConfig
from clip_exp.data.tables.table import bad_rows, unconverted_values
from clip_exp.data.tables.unconverted import as_json

EXAMPLES = 20
CUT_EXAMPLES = 5
FREQUENT = 20
BAD_ROW_EXAMPLES = 50


def describe(
    scanned: list[Scanned], equal: Equalities, config: CheckDataConfig, vocabulary: Vocabulary
) -> dict[str, dict[str, Any]]:
    """Return the statistics of each split by name, except leakage and speed."""
    return {
        each.split.name: {
            **_describe_rows(each),
            **describe_images(each.good, config.model.image.image_size),
            "captions": _describe_captions(each, equal, number, config, vocabulary),
            "duplicates": _describe_duplicates(each, equal, number),
        }
        for number, each in enumerate(scanned)
    }


def describe_leakage(scanned: list[Scanned], leakage: Leakage) -> dict[str, Any]:
    """Return the counts and examples of leaked images."""
    train, val = (each.split for each in scanned)

    def described(leaks: list[Any]) -> dict[str, Any]:
        examples = [
            {"val": val.path_of(leak.val_image), "train": train.path_of(leak.train_image)} for leak in leaks[:EXAMPLES]
        ]
        return {"count": len(leaks), "examples": examples}

    pairs = [{"path": val.path(row), "caption": val.caption(row)} for row in leakage.pairs[:EXAMPLES].tolist()]
    return {
        "images": leakage.images,
        "fraction": leakage.fraction,
        "same_bytes": described(leakage.same_bytes),
        "same_path": described(leakage.same_path),
        "same_image_and_caption": {"count": len(leakage.pairs), "examples": pairs},
        "sampled": any(each.checked < each.images for each in scanned),
    }


def _describe_rows(scanned: Scanned) -> dict[str, Any]:
    parts = list(scanned.split.parts)
    by_reason = bad_rows(parts)
    examples = [
        {"file": str(part.path), "number": line, "unit": part.unit, "reason": reason}
        for part in parts
        for line, reason in part.bad_examples
    ]
    kinds = _most_common_first(scanned.bad.kinds)
    return {
        "files": [{"file": str(part.path), "rows": part.rows, "bad_rows": sum(part.bad.values())} for part in parts],
        "rows": len(scanned.split),
        "images": scanned.images,
        "images_checked": scanned.checked,
        "bad_rows": {
            "count": by_reason.total(),
            "fraction": fraction(by_reason.total(), sum(part.seen for part in parts)),
            "by_reason": _most_common_first(by_reason),
            "examples": examples[:BAD_ROW_EXAMPLES],
        },
        "filter_values": as_json(unconverted_values(parts)),
        "bad_images": {
            "count": scanned.bad.kinds.total(),
            "fraction": fraction(scanned.bad.kinds.total(), scanned.checked),
            "by_kind": kinds,
            "examples": [example._asdict() for kind in kinds for example in scanned.bad.examples[kind]],
        },
    }


def _most_common_first(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _describe_captions(
    scanned: Scanned, equal: Equalities, number: int, config: CheckDataConfig, vocabulary: Vocabulary
) -> dict[str, Any]:
    rows, split, captions = scanned.rows, scanned.split, equal.captions[number]
    tokens = rows["tokens"].astype(np.int64) + vocabulary.special
    cut = tokens > vocabulary.context_length
    cut_rows = np.flatnonzero(cut)
    shown = cut_rows[np.linspace(0, len(cut_rows) - 1, min(len(cut_rows), CUT_EXAMPLES)).round().astype(np.int64)]
    _, first, counts = np.unique(captions, return_index=True, return_counts=True)
    frequent = np.lexsort((first, -counts))[:FREQUENT]
    pairs = equal_pairs_in_batch(captions, split.image_of_row, config.global_batch_size, config.data.captions)
    return {
        "count": len(rows),
        "context_length": vocabulary.context_length,
        "tokens": quantiles(tokens),
        "histogram": linear_histogram(tokens, vocabulary.context_length + 1),
        "truncated": {
            **counted_fraction(cut),
            "examples": [
                {"where": split.where(row), "tokens": int(tokens[row]), "caption": split.caption(row)}
                for row in shown.tolist()
            ],
        },
        "empty": counted_fraction(rows["characters"] == 0),
        "lists": sum(part.list_captions for part in split.parts),
        "several_lines": sum(part.captions_with_lines for part in split.parts),
        "distinct": len(counts),
        "most_frequent": [
            {"caption": split.caption(int(first[at])), "rows": int(counts[at])} for at in frequent if counts[at] > 1
        ],
        "equal_in_batch": {"global_batch_size": config.global_batch_size, "pairs": pairs},
        "scripts": _describe_scripts(scanned, vocabulary),
    }


def _describe_scripts(scanned: Scanned, vocabulary: Vocabulary) -> dict[str, dict[str, Any]]:
    """Return statistics by script, most frequent first, with a caption of median length as an example."""
    rows = scanned.rows
    english = english_tokens_per_character(vocabulary.uncut, vocabulary.special)
    count = np.bincount(rows["script"], minlength=len(SCRIPTS))
    tokens = np.bincount(rows["script"], rows["tokens"], len(SCRIPTS))
    characters = np.bincount(rows["script"], rows["characters"], len(SCRIPTS))
    described: dict[str, dict[str, Any]] = {}
    for script in sorted(np.flatnonzero(count).tolist(), key=lambda script: -int(count[script])):
        ratio = float(tokens[script] / max(characters[script], 1))
        found = np.flatnonzero(rows["script"] == script)
        lengths = rows["characters"][found]
        typical = int(found[np.argmin(np.abs(lengths - np.median(lengths)))])
        described[SCRIPTS[script]] = {
            "captions": int(count[script]),
            "fraction": count[script] / len(rows),
            "tokens_per_character": ratio,
            "times_english": ratio / english,
            "split_badly": script != NO_LETTERS and ratio / english >= SPLIT_BADLY,
            "example": {
                "caption": scanned.split.caption(typical),
                "characters": int(rows["characters"][typical]),
                "tokens": int(rows["tokens"][typical]),
            },
        }
    return described


def _describe_duplicates(scanned: Scanned, equal: Equalities, number: int) -> dict[str, Any]:
    split = scanned.split
    images, pairs = equal_groups(equal.contents[number]), equal_groups(equal.pairs[number])
    return {
        "images": {
            "groups": len(images),
            "copies": sum(len(group) - 1 for group in images),
            "examples": [[split.path_of(at) for at in group[:EXAMPLES]] for group in images[:EXAMPLES]],
        },
        "pairs": {
            "groups": len(pairs),
            "copies": sum(len(group) - 1 for group in pairs),
            "examples": [
                {"caption": split.caption(int(group[0])), "where": [split.where(int(row)) for row in group[:EXAMPLES]]}
                for group in pairs[:EXAMPLES]
            ],
        },
    }
