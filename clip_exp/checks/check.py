"""A check of open tables: scan them, judge what was found, and leave it in a folder: a report, a page, and lists."""

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clip_exp.checks.describe import describe, describe_leakage
from clip_exp.checks.duplicates import Equalities, equal_groups
from clip_exp.checks.scan import Scanned, Vocabulary, bad_samples_file, scan_split
from clip_exp.checks.splits import TRAIN, VAL, Split
from clip_exp.checks.statistics import describe_speed
from clip_exp.checks.verdicts import Level, Verdict, judge
from clip_exp.config.base import plain
from clip_exp.config.commands import CheckDataConfig
from clip_exp.data.files import BadImage, ImageLimits
from clip_exp.data.images import decode_rgb
from clip_exp.data.loader import cores_per_rank, count_workers, killed_workers_are_told
from clip_exp.devices import resolve_accelerator
from clip_exp.errors import DataError
from clip_exp.reports.data_page import Equal, Gallery, ImageExample, data_page
from clip_exp.reports.html import SIDE, Thumbnail, shrunk
from clip_exp.runs import write_json, write_text
from clip_exp.storage import TextWriter, atomic_file
from clip_exp.text.tokenizer import build_tokenizer

VERSION = 1  # of report.json
SETTINGS = ("decode", "max_images", "max_leakage", "global_batch_size")


def run(
    splits: list[Split], config: CheckDataConfig, folder: Path, command: str
) -> tuple[dict[str, Any], list[Verdict]]:
    """Write `report.json`, `report.html` and the lists into `folder`; return the first, and its verdicts.

    Args:
        command: that was typed, for the page.

    Raises:
        ConfigError: a tokenizer that cannot be had.
        DataError: one of the processes was killed.
    """
    workers = cores_per_rank(1) if config.num_workers is None else config.num_workers
    vocabulary = Vocabulary.of(build_tokenizer(config.model.text))
    with bad_samples_file(folder / "bad_samples.csv") as bad_samples, killed_workers_are_told("num_workers"):
        scanned = [scan_split(split, config, vocabulary, workers, bad_samples) for split in splits]
    equal = Equalities(scanned)
    loader_workers = count_workers(config.data.num_workers, 1, resolve_accelerator("auto"))
    report: dict[str, Any] = {
        "version": VERSION,
        "name": config.name,
        "model": {
            "name": config.model.name,
            "image_size": config.model.image.image_size,
            "context_length": vocabulary.context_length,
        },
        "settings": {key: plain(getattr(config, key)) for key in SETTINGS},
        "splits": describe(scanned, equal, config, vocabulary),
        "leakage": None if equal.leakage is None else describe_leakage(scanned, equal.leakage),
        "speed": describe_speed([each.good for each in scanned], loader_workers, config.decode),
    }
    verdicts = judge(report, config)
    grave = any(verdict.level is Level.error for verdict in verdicts)
    report |= {"verdicts": [asdict(verdict) for verdict in verdicts], "exit_code": DataError.exit_code if grave else 0}
    write_json(folder / "report.json", report)
    write_lists(folder, scanned, equal)
    gallery = collect(scanned, equal, ImageLimits.of(config.data))
    write_text(folder / "report.html", data_page(report, gallery, folder, command))
    return report, verdicts


# Lists beside the report: what is to be repaired or removed, a row for each.


def write_lists(folder: Path, scanned: list[Scanned], equal: Equalities) -> None:
    """Write `bad_rows.csv`, `duplicates.csv` and `leakage.csv`; of each file's bad rows the first (`MAX_EXAMPLES`)."""
    bad_rows = (
        [part.path, line, reason, each.split.name]
        for each in scanned
        for part in each.split.parts
        for line, reason in part.bad_examples
    )
    _write(folder / "bad_rows.csv", ["file", "line", "reason", "split"], bad_rows)
    _write(folder / "duplicates.csv", ["split", "what", "group", "path", "where"], _duplicates(scanned, equal))
    if equal.leakage is not None:
        train, val = (each.split for each in scanned)
        leaked = (
            [val.path_of(leak.val_image), train.path_of(leak.train_image), same]
            for same, leaks in (("bytes", equal.leakage.same_bytes), ("path", equal.leakage.same_path))
            for leak in leaks
        )
        _write(folder / "leakage.csv", ["val", "train", "same"], leaked)


def _duplicates(scanned: list[Scanned], equal: Equalities) -> Iterable[list[Any]]:
    for each, contents, pairs in zip(scanned, equal.contents, equal.pairs, strict=True):
        split = each.split
        images = [split.first_rows[group] for group in equal_groups(contents)]
        for what, groups in (("image", images), ("pair", equal_groups(pairs))):
            for number, rows in enumerate(groups, start=1):
                yield from ([split.name, what, number, split.path(row), split.where(row)] for row in rows.tolist())


def _write(path: Path, header: list[str], rows: Iterable[list[Any]]) -> None:
    with (
        atomic_file(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        writer = TextWriter(file)
        writer.writerow(header)
        writer.writerows(rows)


# Images for the page: some good ones with their captions, and some that there are more than once.

IMAGES = {TRAIN: 12, VAL: 8}
CAPTIONS = 5  # of an image
EQUAL = 8  # images that there are more than once
PATHS = 6  # of such an image


def collect(scanned: list[Scanned], equal: Equalities, limits: ImageLimits) -> Gallery:
    """Return what the page shows; the same each time for the same data."""
    samples: dict[str, list[ImageExample]] = {}
    copies: list[Equal] = []
    for each, contents in zip(scanned, equal.contents, strict=True):
        split, good = each.split, each.good["image"]
        samples[split.name] = []
        chosen = np.random.default_rng(0).choice(good, min(len(good), IMAGES[split.name]), replace=False)
        for image in np.sort(chosen).tolist():
            rows = np.flatnonzero(split.image_of_row == image).tolist()
            captions = [split.caption(row) for row in rows[:CAPTIONS]]
            example = ImageExample(_thumbnail(split, rows[0], limits), captions, len(rows) - len(captions))
            samples[split.name].append(example)
        for group in equal_groups(contents)[:EQUAL]:
            rows = split.first_rows[group].tolist()
            paths = [(split.name, split.path(row)) for row in rows[:PATHS]]
            copies.append(Equal(_thumbnail(split, rows[0], limits), paths))
    leaks: list[Equal] = []
    if equal.leakage is not None:
        train, val = (each.split for each in scanned)
        of_val = {leak.val_image: leak for leak in (*equal.leakage.same_path, *equal.leakage.same_bytes)}
        for image in sorted(of_val)[:EQUAL]:
            paths = [(VAL, val.path_of(image)), (TRAIN, train.path_of(of_val[image].train_image))]
            leaks.append(Equal(_thumbnail(val, int(val.first_rows[image]), limits), paths))
    return Gallery(samples, copies, leaks)


def _thumbnail(split: Split, row: int, limits: ImageLimits) -> Thumbnail:
    """What training sees of an image, before its crop."""
    path = split.path(row)
    try:
        image = decode_rgb(split.read_image(row, limits), limits)
    except BadImage as error:
        return Thumbnail(None, SIDE, SIDE, path, str(error))
    return shrunk(Image.fromarray(image.permute(1, 2, 0).numpy()), path)
