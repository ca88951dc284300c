"""Check of opened tables: scan them, find problems, and write a JSON report, an HTML report and lists to a folder."""

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
from clip_exp.checks.verdicts import Level, Verdict, find_problems
from clip_exp.config.base import plain
from clip_exp.config.commands import CheckDataConfig
from clip_exp.data.files import BadImage, ImageLimits
from clip_exp.data.images import decode_rgb
from clip_exp.data.loader import cores_per_rank, count_workers, report_killed_workers
from clip_exp.devices import resolve_accelerator
from clip_exp.errors import DataError
from clip_exp.reports.data_report import DuplicateImage, Gallery, ImageExample, data_report
from clip_exp.reports.html import SIDE, Thumbnail, shrunk
from clip_exp.runs import write_json, write_text
from clip_exp.storage import TextWriter, atomic_file
from clip_exp.text.tokenizer import build_tokenizer

VERSION = 1  # of report.json
SETTINGS = ("decode", "max_images", "max_leakage", "global_batch_size")


def run(
    splits: list[Split], config: CheckDataConfig, folder: Path, command: str
) -> tuple[dict[str, Any], list[Verdict]]:
    """Write the reports and lists to `folder`; return the content of `report.json` and the verdicts.

    Args:
        command: command line, for the report.

    Raises:
        ConfigError: the tokenizer is not available.
        DataError: a worker process was killed.
    """
    workers = cores_per_rank(1) if config.num_workers is None else config.num_workers
    vocabulary = Vocabulary.of(build_tokenizer(config.model.text))
    with bad_samples_file(folder / "bad_samples.csv") as bad_samples, report_killed_workers("num_workers"):
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
    verdicts = find_problems(report, config)
    failed = any(verdict.level is Level.error for verdict in verdicts)
    report |= {"verdicts": [asdict(verdict) for verdict in verdicts], "exit_code": DataError.exit_code if failed else 0}
    write_json(folder / "report.json", report)
    write_lists(folder, scanned, equal)
    gallery = collect(scanned, equal, ImageLimits.of(config.data))
    write_text(folder / "report.html", data_report(report, gallery, folder, command))
    return report, verdicts


# Lists of rows and images to repair or remove.


def write_lists(folder: Path, scanned: list[Scanned], equal: Equalities) -> None:
    """Write `bad_rows.csv` (the first `MAX_EXAMPLES` of each file), `duplicates.csv` and `leakage.csv`."""
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


# Images for the HTML report: a sample with captions, duplicates and leaked images.

IMAGES = {TRAIN: 12, VAL: 8}
CAPTIONS = 5  # captions per image
EQUAL = 8  # duplicated images
PATHS = 6  # paths per duplicated image


def collect(scanned: list[Scanned], equal: Equalities, limits: ImageLimits) -> Gallery:
    """Return the images for the report. The choice is deterministic."""
    samples: dict[str, list[ImageExample]] = {}
    copies: list[DuplicateImage] = []
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
            copies.append(DuplicateImage(_thumbnail(split, rows[0], limits), paths))
    leaks: list[DuplicateImage] = []
    if equal.leakage is not None:
        train, val = (each.split for each in scanned)
        of_val = {leak.val_image: leak for leak in (*equal.leakage.same_path, *equal.leakage.same_bytes)}
        for image in sorted(of_val)[:EQUAL]:
            paths = [(VAL, val.path_of(image)), (TRAIN, train.path_of(of_val[image].train_image))]
            leaks.append(DuplicateImage(_thumbnail(val, int(val.first_rows[image]), limits), paths))
    return Gallery(samples, copies, leaks)


def _thumbnail(split: Split, row: int, limits: ImageLimits) -> Thumbnail:
    """Return a thumbnail of an image as training decodes it, before the crop."""
    path = split.path(row)
    try:
        image = decode_rgb(split.read_image(row, limits), limits)
    except BadImage as error:
        return Thumbnail(None, SIDE, SIDE, path, str(error))
    return shrunk(Image.fromarray(image.permute(1, 2, 0).numpy()), path)
