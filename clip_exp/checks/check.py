"""A check of open tables: scan them, judge what was found, and leave it in a folder."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from clip_exp.checks.describe import Equalities, describe, describe_leakage
from clip_exp.checks.gallery import collect
from clip_exp.checks.lists import write_lists
from clip_exp.checks.pictures import describe_speed
from clip_exp.checks.scanned import Scanned, Vocabulary, bad_samples_file, scan_split
from clip_exp.checks.splits import Split
from clip_exp.checks.verdicts import Level, Verdict, judge
from clip_exp.config.base import plain
from clip_exp.config.commands import CheckDataConfig
from clip_exp.data.files import ImageLimits
from clip_exp.data.loader import cores_per_rank, count_workers, killed_workers_are_told
from clip_exp.devices import resolve_accelerator
from clip_exp.errors import DataError
from clip_exp.reports.data_page import data_page
from clip_exp.runs import write_json, write_text
from clip_exp.text.tokenizer import build_tokenizer

VERSION = 1  # of report.json
SETTINGS = ("decode", "max_pictures", "max_leakage", "global_batch_size")


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
    report = _report(scanned, equal, config, vocabulary)
    verdicts = judge(report, config)
    grave = any(verdict.level is Level.error for verdict in verdicts)
    report |= {"verdicts": [asdict(verdict) for verdict in verdicts], "exit_code": DataError.exit_code if grave else 0}
    write_json(folder / "report.json", report)
    write_lists(folder, scanned, equal)
    gallery = collect(scanned, equal, ImageLimits.of(config.data))
    write_text(folder / "report.html", data_page(report, gallery, folder, command))
    return report, verdicts


def _report(
    scanned: list[Scanned], equal: Equalities, config: CheckDataConfig, vocabulary: Vocabulary
) -> dict[str, Any]:
    loader_workers = count_workers(config.data.num_workers, 1, resolve_accelerator("auto"))
    return {
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
