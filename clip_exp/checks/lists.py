"""Complete lists beside the report: what is to be repaired or removed, a row for each."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from clip_exp.checks.describe import Equalities
from clip_exp.checks.duplicates import equal_groups
from clip_exp.checks.scanned import Scanned
from clip_exp.spreadsheets import TextWriter
from clip_exp.storage import atomic_file


def write_lists(folder: Path, scanned: list[Scanned], equal: Equalities) -> None:
    """Write `bad_rows.csv`, `duplicates.csv` and `leakage.csv`; of each file's bad rows the first (`MAX_EXAMPLES`)."""
    _write(folder / "bad_rows.csv", ["file", "line", "reason", "split"], _bad_rows(scanned))
    _write(folder / "duplicates.csv", ["split", "what", "group", "path", "where"], _duplicates(scanned, equal))
    if equal.leakage is not None:
        _write(folder / "leakage.csv", ["val", "train", "same"], _leaks(scanned, equal))


def _bad_rows(scanned: list[Scanned]) -> Iterable[list[Any]]:
    for each in scanned:
        for part in each.split.parts:
            for line, reason in part.bad_examples:
                yield [part.file, line, reason, each.split.name]


def _duplicates(scanned: list[Scanned], equal: Equalities) -> Iterable[list[Any]]:
    for each, contents, pairs in zip(scanned, equal.contents, equal.pairs, strict=True):
        split = each.split
        for what, groups, first_rows in (
            ("picture", equal_groups(contents), split.first_rows),
            ("pair", equal_groups(pairs), None),
        ):
            for number, group in enumerate(groups, start=1):
                for at in group.tolist():
                    row = at if first_rows is None else int(first_rows[at])
                    yield [split.name, what, number, split.path(row), split.where(row)]


def _leaks(scanned: list[Scanned], equal: Equalities) -> Iterable[list[Any]]:
    assert equal.leakage is not None
    train, val = (each.split for each in scanned)
    for same, leaks in (("bytes", equal.leakage.same_bytes), ("path", equal.leakage.same_path)):
        for leak in leaks:
            yield [
                val.path(int(val.first_rows[leak.val_picture])),
                train.path(int(train.first_rows[leak.train_picture])),
                same,
            ]


def _write(path: Path, header: list[str], rows: Iterable[list[Any]]) -> None:
    with (
        atomic_file(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        writer = TextWriter(file)
        writer.writerow(header)
        writer.writerows(rows)
