"""A corpus of damaged images and tables. Each is read, or refused with a reason, in little time and memory."""

import csv
import logging
import multiprocessing
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from clip_exp.config.data import DataConfig, OnBadRow
from clip_exp.data.datamodule import PairsDataModule
from clip_exp.data.files import KINDS, BadImage, ImageLimits, kind_of
from clip_exp.data.images import decode, decode_rgb, preprocessing_of
from clip_exp.data.tables.open import open_table, read_table
from clip_exp.data.tables.reader import TableOptions
from clip_exp.errors import ClipExpError
from clip_exp.models.families.clip import ViTConfig
from clip_exp.text.tokenizer import Tokenizer
from tests.data.conftest import noise, write_table
from tests.data.damaged_images import damaged_images
from tests.data.damaged_tables import damaged_tables
from tests.data.test_loader import Place
from tests.processes import start_apart
from tests.runs import Train

SEED = 20_261_124
IMAGES = [300, pytest.param(3000, marks=pytest.mark.exhaustive)]
TABLES = [200, pytest.param(2000, marks=pytest.mark.exhaustive)]
LONGEST_S, MOST_MB = 5.0, 600
BATCH = 50
OPTIONS = TableOptions(on_bad_row=OnBadRow.skip)


def write_pairs(folder: Path, count: int) -> Path:
    """Write a table of `count` damaged images, each followed by a good one."""
    rows = [["filepath", "title"]]
    for i, made in enumerate(damaged_images(folder, count, SEED)):
        noise(i).save(folder / f"sound-{i}.jpg")
        rows += [[made.name, f"damaged {i}"], [f"sound-{i}.jpg", f"sound {i}"]]
    return write_table(folder / "pairs.csv", rows)


@pytest.fixture(scope="module", params=IMAGES)
def pairs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("damage") / "images", request.param)


@pytest.fixture(scope="module", params=TABLES)
def tables(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return damaged_tables(tmp_path_factory.mktemp("tables"), request.param, SEED)


class Read(NamedTuple):
    """Result for an input, with the CPU time, which does not depend on other processes."""

    what: Any
    seconds: float


def timed(read: Callable[..., Any], *arguments: Any) -> Read:
    start = time.process_time()
    return Read(read(*arguments), time.process_time() - start)


def memory_mb(what: str, process: int | str = "self") -> float:
    """Return a field of /proc/self/status. `RssAnon`: anonymous memory, which a forked process shares with its parent; `VmHWM`: the peak."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    return int(status[what].split()[0]) / 1024


# Images


def reason(read: Callable[..., Any], *arguments: Any) -> str | None:
    try:
        read(*arguments)
    except BadImage as error:
        return str(error)
    return None


def read_each(pairs: Path) -> tuple[dict[str, tuple[Read, Read]], float]:
    """Read every image as training and as evaluation do. Return the reasons of refused images, and the memory."""
    before_mb = memory_mb("RssAnon")
    table, limits = read_table(pairs), ImageLimits()
    found = {
        table.path(row): (
            timed(reason, lambda row=row: decode_rgb(table.read_image(row, limits), limits)),
            timed(reason, lambda row=row: decode(table.read_image(row, limits), limits)),
        )
        for row in range(len(table))
    }
    return found, memory_mb("VmHWM") - before_mb


def read_epoch(pairs: Path, run_dir: Path, workers: int, ranks: int) -> tuple[Counter[str], list[float]]:
    """Return the bad images of an epoch by kind, as counted by the data module, and the memory of each worker."""
    before_mb = memory_mb("RssAnon")
    total = (len(read_table(pairs)) - 1) // BATCH + 1
    for rank in range(ranks):
        module = PairsDataModule(
            DataConfig(name="csv", train=str(pairs), num_workers=workers, max_bad_fraction=1.0),
            preprocessing=preprocessing_of(ViTConfig(image_size=16, patch_size=8, width=8, layers=1, heads=1)),
            tokenizer=Tokenizer(),
            global_batch_size=BATCH,
            total_steps=total,
            output_dir=run_dir,
            run_dir=run_dir,
        )
        module.trainer = Place(rank, ranks)
        for batch in module.train_dataloader():
            module.on_before_batch_transfer(batch, 0)
    assert module.bad_samples is not None
    peaks_mb = [memory_mb("VmHWM", process.pid) - before_mb for process in multiprocessing.active_children()]
    return module.bad_samples.kinds(), peaks_mb


@pytest.fixture(scope="module")
def each(pairs: Path) -> tuple[dict[str, tuple[Read, Read]], float]:
    """Read every image in a separate process."""
    return start_apart(read_each, pairs).result()


def test_each_image_is_read_or_refused_with_a_reason_in_time(pairs: Path, each) -> None:
    found, peak_mb = each
    assert 0 < peak_mb < MOST_MB
    assert len(found) == len(read_table(pairs))
    for path, (training, evaluation) in found.items():
        assert max(training.seconds, evaluation.seconds) < LONGEST_S, path
        for refused in (training.what, evaluation.what):
            assert refused is None or kind_of(refused) in KINDS, (path, refused)
        assert (training.what is None) == (evaluation.what is None), (path, training.what, evaluation.what)


def test_the_counts_by_kind_are_the_same_for_any_workers_and_ranks(pairs: Path, each, tmp_path: Path) -> None:
    found, _ = each
    expected = Counter(kind_of(read.what) for read, _ in found.values() if read.what is not None)
    assert len(expected) >= 6
    for workers, ranks in ((0, 1), (2, 1), (1, 2)):
        run_dir = tmp_path / f"{workers} workers, {ranks} ranks"
        run_dir.mkdir()
        kinds, peaks_mb = start_apart(read_epoch, pairs, run_dir, workers, ranks).result()
        assert kinds == expected, (workers, ranks)
        assert len(peaks_mb) == workers
        assert all(0 < peak_mb < MOST_MB for peak_mb in peaks_mb)


@pytest.mark.exhaustive
def test_two_ranks_of_a_run_list_the_bad_images_that_one_lists(train: Train, tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "images", 100)
    listed = []
    for ranks in (1, 2):
        run = train(
            "model=vit_nano", "data=csv", f"data.train={pairs}", "data.max_bad_fraction=1", "data.num_workers=1",
            "global_batch_size=20", "max_steps=10", "trainer.accelerator=cpu", f"trainer.devices={ranks}", "resume=never",
        )  # fmt: skip
        with (run.folder / "bad_samples.csv").open(newline="", encoding="utf-8") as stream:
            listed.append(sorted(csv.reader(stream)))
        assert sum(run.summary["bad_images"]["training"].values()) == len(listed[-1]) - 1
    assert listed[0] == listed[1]
    assert len(listed[0]) > 50


# Tables


def read_rows(file: Path, options: TableOptions, index_dir: Path | None) -> Any:
    """Return the rows of a table and its bad rows by reason, or the error message."""
    limits = ImageLimits()
    try:
        table = open_table(file, options, index_dir=index_dir)
    except ClipExpError as error:
        return str(error)
    refused = [reason(table.read_image, row, limits) for row in range(len(table))]
    rows = [(table.path(row), table.caption(row), table.where(row)) for row in range(len(table))]
    return rows, refused, table.image_index().tolist(), [part.bad for part in table.parts]


def read_tables(files: Sequence[Path], options: TableOptions, index_dir: Path | None) -> tuple[list[Read], float]:
    """Read all tables; return the results and the memory."""
    logging.disable()
    before_mb = memory_mb("RssAnon")
    found = [timed(read_rows, file, options, index_dir) for file in files]
    return found, memory_mb("VmHWM") - before_mb


def test_each_table_is_read_or_refused_with_a_reason_in_time(tables: list[Path]) -> None:
    reasons = set()
    for policy in OnBadRow:
        found, peak_mb = start_apart(read_tables, tables, TableOptions(on_bad_row=policy), None).result()
        assert 0 < peak_mb < MOST_MB
        for file, read in zip(tables, found, strict=True):
            assert read.seconds < LONGEST_S, file.name
            if isinstance(read.what, str):
                assert str(file) in read.what, (file.name, read.what)
                assert len(read.what) < 1500, (file.name, read.what[:1500])
            else:
                reasons |= {kind for bad in read.what[3] for kind in bad}
                assert all(refused is None or kind_of(refused) in KINDS for refused in read.what[1]), file.name
        refused = sum(isinstance(read.what, str) for read in found)
        assert len(tables) / 4 < refused < len(tables) * 9 / 10, "the corpus is neither harmless nor hopeless"
    assert 6 <= len(reasons) < 30, f"reasons are kinds, not messages: {reasons}"


def test_two_ranks_that_share_an_index_read_what_one_process_reads(tables: list[Path], tmp_path: Path) -> None:
    expected, _ = start_apart(read_tables, tables, OPTIONS, None).result()
    ranks = [start_apart(read_tables, tables, OPTIONS, tmp_path / "index") for _ in range(2)]
    for rank in ranks:
        found, peak_mb = rank.result()
        assert 0 < peak_mb < MOST_MB
        for file, mine, whole in zip(tables, found, expected, strict=True):
            assert mine.what == whole.what, file.name
