"""All that was found out, as plain values: `report.json`. Its keys stay."""

from typing import Any

import numpy as np

from clip_exp.checks.captions import (
    describe_lengths,
    describe_repeats,
    equal_pairs_in_batch,
    number_captions,
    spread_examples,
)
from clip_exp.checks.distributions import share
from clip_exp.checks.duplicates import Leakage, equal_groups, find_leakage, number_contents, number_pairs
from clip_exp.checks.pictures import describe_pictures
from clip_exp.checks.scanned import Scanned, Vocabulary
from clip_exp.checks.scripts import describe_scripts, english_tokens_per_character
from clip_exp.config.commands import CheckDataConfig
from clip_exp.data.tables.comparisons import as_json
from clip_exp.data.tables.table import bad_rows, unlike_values

EXAMPLES = 20
CUT_EXAMPLES = 5
BAD_ROW_EXAMPLES = 50


class Equalities:
    """Which pictures, captions and pairs are the same, over all splits.

    Attributes:
        contents: number of each picture's bytes, of each split.
        captions: number of each row's caption.
        pairs: number of each row's picture and caption together.
        leakage: None without a validation split.
    """

    def __init__(self, scanned: list[Scanned]) -> None:
        self.contents = number_contents(
            [each.good["digest"] for each in scanned],
            [each.good["picture"] for each in scanned],
            [each.pictures for each in scanned],
        )
        self.captions = number_captions([each.rows for each in scanned])
        captions = 1 + max(int(numbers.max()) for numbers in self.captions)
        self.pairs = [
            number_pairs(contents[each.split.picture_of_row], numbers, captions)
            for each, contents, numbers in zip(scanned, self.contents, self.captions, strict=True)
        ]
        self.leakage: Leakage | None = None
        if len(scanned) == 2:
            train, val = (each.rows["path"][each.split.first_rows] for each in scanned)
            self.leakage = find_leakage(
                (self.contents[0], self.contents[1]), (train, val), (self.pairs[0], self.pairs[1])
            )


def describe(
    scanned: list[Scanned], equal: Equalities, config: CheckDataConfig, vocabulary: Vocabulary
) -> dict[str, dict[str, Any]]:
    """By name of the split, everything but leakage and speed."""
    return {
        each.split.name: {
            **_describe_rows(each),
            "bad_pictures": _describe_bad_pictures(each),
            **describe_pictures(each.good, config.model.image.image_size),
            "captions": _describe_captions(each, equal, number, config, vocabulary),
            "duplicates": _describe_duplicates(each, equal, number),
        }
        for number, each in enumerate(scanned)
    }


def describe_leakage(scanned: list[Scanned], leakage: Leakage) -> dict[str, Any]:
    """What validation shares with training, with examples."""
    train, val = (each.split for each in scanned)

    def described(leaks: list[Any]) -> dict[str, Any]:
        examples = [
            {
                "val": val.path(int(val.first_rows[leak.val_picture])),
                "train": train.path(int(train.first_rows[leak.train_picture])),
            }
            for leak in leaks[:EXAMPLES]
        ]
        return {"count": len(leaks), "examples": examples}

    pairs = [{"path": val.path(row), "caption": val.caption(row)} for row in leakage.pairs[:EXAMPLES].tolist()]
    return {
        "pictures": leakage.pictures,
        "share": leakage.share,
        "same_bytes": described(leakage.same_bytes),
        "same_path": described(leakage.same_path),
        "same_picture_and_caption": {"count": len(leakage.pairs), "examples": pairs},
        "sampled": any(each.checked < each.pictures for each in scanned),
    }


def _describe_rows(scanned: Scanned) -> dict[str, Any]:
    parts = list(scanned.split.parts)
    by_reason = bad_rows(parts)
    bad = by_reason.total()
    examples = [
        {"file": str(part.file), "number": line, "unit": part.unit, "reason": reason}
        for part in parts
        for line, reason in part.bad_examples
    ]
    return {
        "files": [{"file": str(part.file), "rows": part.rows, "bad_rows": sum(part.bad.values())} for part in parts],
        "rows": len(scanned.split),
        "pictures": scanned.pictures,
        "pictures_checked": scanned.checked,
        "bad_rows": {
            "count": bad,
            "share": share(bad, sum(part.seen for part in parts)),
            "by_reason": dict(sorted(by_reason.items(), key=lambda item: (-item[1], item[0]))),
            "examples": examples[:BAD_ROW_EXAMPLES],
        },
        "filter_values": as_json(unlike_values(parts)),
    }


def _describe_bad_pictures(scanned: Scanned) -> dict[str, Any]:
    kinds = scanned.bad.kinds
    count = sum(kinds.values())
    ordered = sorted(kinds.items(), key=lambda item: (-item[1], item[0]))
    return {
        "count": count,
        "share": share(count, scanned.checked),
        "by_kind": dict(ordered),
        "examples": [example._asdict() for kind, _ in ordered for example in scanned.bad.examples[kind]],
    }


def _describe_captions(
    scanned: Scanned, equal: Equalities, number: int, config: CheckDataConfig, vocabulary: Vocabulary
) -> dict[str, Any]:
    rows, split, special = scanned.rows, scanned.split, vocabulary.special
    lengths = describe_lengths(rows, vocabulary.context_length, special)
    cut = rows["tokens"] > vocabulary.context_length - special
    lengths["truncated"]["examples"] = [
        {"where": split.where(row), "tokens": int(rows["tokens"][row]) + special, "caption": split.caption(row)}
        for row in spread_examples(cut, CUT_EXAMPLES)
    ]
    scripts = describe_scripts(rows, english_tokens_per_character(vocabulary.uncut, special))
    for described in scripts.values():
        row = described["example"]
        described["example"] = {
            "caption": split.caption(row),
            "characters": int(rows["characters"][row]),
            "tokens": int(rows["tokens"][row]),
        }
    pairs = equal_pairs_in_batch(
        equal.captions[number], split.picture_of_row, config.global_batch_size, config.data.captions
    )
    return {
        **lengths,
        **describe_repeats(equal.captions[number], split.caption),
        "equal_in_batch": {"global_batch_size": config.global_batch_size, "pairs": pairs},
        "scripts": scripts,
    }


def _describe_duplicates(scanned: Scanned, equal: Equalities, number: int) -> dict[str, Any]:
    split = scanned.split
    pictures, pairs = equal_groups(equal.contents[number]), equal_groups(equal.pairs[number])

    def surplus(groups: list[np.ndarray]) -> int:
        return sum(len(group) - 1 for group in groups)

    return {
        "pictures": {
            "groups": len(pictures),
            "copies": surplus(pictures),
            "examples": [
                [split.path(int(split.first_rows[at])) for at in group[:EXAMPLES]] for group in pictures[:EXAMPLES]
            ],
        },
        "pairs": {
            "groups": len(pairs),
            "copies": surplus(pairs),
            "examples": [
                {"caption": split.caption(int(group[0])), "where": [split.where(int(row)) for row in group[:EXAMPLES]]}
                for group in pairs[:EXAMPLES]
            ],
        },
    }
