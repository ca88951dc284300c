"""Samples are bit-equal to those of one process without workers, for any number of workers and ranks, and after any restart."""

import hashlib
import io
import tarfile
from collections.abc import Callable
from functools import cache
from itertools import chain
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clip_exp.config.data import AugmentationConfig, Captions
from clip_exp.data.datamodule import PairsDataModule
from clip_exp.data.loader import Batch
from tests.data.conftest import data_module, noise, write_table
from tests.data.test_loader import Place
from tests.exhaustive import repeat_beyond

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes:UserWarning"),  # of two cores
]

WORKERS = (0, 1, 2, 4)
RANKS = (1, 2, 4)
IMAGES, BATCH = 23, 4
STEPS = 8  # an epoch and two steps more
AUGMENTATION = AugmentationConfig(
    scale=[0.5, 1.0],
    horizontal_flip=0.5,
    color_jitter=[0.4, 0.4, 0.4, 0.1],
    gray_scale_prob=0.3,
    gaussian_blur_prob=0.3,
)
BAD = {4: None, 17: b"<html>not found</html>"}  # image: its bytes, None for a missing one


def image(i: int) -> bytes | None:
    if i in BAD:
        return BAD[i]
    file = io.BytesIO()
    noise(i, 32, 24).save(file, "JPEG" if i % 2 else "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the same pairs as a CSV file, a Parquet file and three shards, and a table with other captions as a second source."""
    folder = tmp_path_factory.mktemp("pairs")
    names = [f"{i:02d}.{'jpg' if i % 2 else 'png'}" for i in range(IMAGES)]
    captions = [f"caption of {i}" + " and more" * (i % 5) for i in range(IMAGES)]
    contents = [image(i) for i in range(IMAGES)]
    for name, data in zip(names, contents, strict=True):
        if data is not None:
            (folder / name).write_bytes(data)
    triples = list(zip(names, contents, captions, strict=True))
    for shard in range(3):
        with tarfile.open(folder / f"shard-{shard}.tar", "w") as tar:
            for name, data, caption in triples[8 * shard : 8 * shard + 8]:
                for member, content in ((name, data or b""), (f"{name[:2]}.txt", caption.encode())):
                    info = tarfile.TarInfo(member)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    rows = [list(row) for row in zip(names, captions, strict=True)]
    write_table(folder / "pairs.csv", [["filepath", "title"], *rows, [names[3], "another caption of 3"]])
    write_table(folder / "second.csv", [["filepath", "title"], *([name, f"second {text}"] for name, text in rows[:9])])
    paths, texts = zip(*rows, [names[3], "another caption of 3"], strict=True)
    pq.write_table(pa.table({"filepath": paths, "title": texts}), folder / "pairs.parquet")
    return folder


DATA: dict[str, Callable[[Path], dict[str, object]]] = {
    "csv": lambda folder: {"train": str(folder / "pairs.csv")},
    "parquet": lambda folder: {"train": str(folder / "pairs.parquet"), "captions": Captions.all},
    "shards": lambda folder: {"train": str(folder / "shard-{0..2}.tar"), "shuffle_block": 2, "shuffle_window": 3},
    "mixture": lambda folder: {
        "train": [
            {"path": str(folder / "second.csv"), "weight": 1},
            {"path": str(folder / "shard-*.tar"), "weight": 3},
        ],
        "shuffle_block": 3,
        "shuffle_window": 2,
    },
}


class Reading:
    """Samples of a data module for one kind of data. Each part of the stream is read once and cached."""

    def __init__(self, folder: Path, kind: str) -> None:
        self._folder, self._kind = folder, kind
        self.read = cache(self._read)
        self.whole = self.read(0, 0)

    def module(self, workers: int = 0, place: Place | None = None) -> PairsDataModule:
        module = data_module(
            self._folder / "outputs", **DATA[self._kind](self._folder), total_steps=STEPS, global_batch_size=BATCH,
            num_workers=workers, augmentation=AUGMENTATION,
        )  # fmt: skip
        module.trainer = place  # type: ignore[assignment]
        return module

    def _read(self, step: int, workers: int, end: int = STEPS, rank: int = 0, ranks: int = 1) -> list[list[str]]:
        """Return the hashes of the samples of each step from `step` to `end`, as read by a run that was resumed at `step`."""
        before = self.module(place=Place(0, 1, global_step=step))
        module = self.module(workers, Place(rank, ranks))
        module.load_state_dict(before.state_dict())
        batches = iter(module.train_dataloader())
        return [samples(next(batches)) for _ in range(step, end)]

    def on_ranks(self, ranks: int, step: int, end: int = STEPS, workers: int = 0) -> list[list[str]]:
        """Return the same for all ranks: the samples of a global batch in order, then its bad images."""
        parts = [self.read(step, workers, end, rank, ranks) for rank in range(ranks)]
        return [sorted(chain.from_iterable(batches), key=is_bad) for batches in zip(*parts, strict=True)]


def samples(batch: Batch) -> list[str]:
    """Return a hash for each sample of a batch, and the bad images."""
    hashes = []
    for image, tokens, caption, image_id in zip(
        batch.image, batch.tokens, batch.caption_id, batch.image_id, strict=True
    ):
        content = image.numpy().tobytes() + tokens[tokens != 0].numpy().tobytes()
        hashes.append(hashlib.sha256(content + bytes(f"{caption} {image_id}", "ascii")).hexdigest())
    return [*hashes, *(f"{Path(path).name} {reason}" for path, reason in batch.bad)]


def is_bad(sample: str) -> bool:
    """Return True for the name of an image with a reason, False for a hash."""
    return " " in sample


@pytest.fixture(scope="module", params=DATA)
def reading(request: pytest.FixtureRequest, folder: Path) -> Reading:
    return Reading(folder, request.param)


def test_the_stream_is_worth_comparing(reading: Reading) -> None:
    """There are bad images, and all samples differ except the replacements."""
    flat = [sample for batch in reading.whole for sample in batch]
    bad = [sample for sample in flat if is_bad(sample)]
    assert len({*bad}) == len(BAD)
    assert len({*flat} - {*bad}) >= STEPS * BATCH - len(bad)


@pytest.mark.parametrize("workers", repeat_beyond([(0, 2)], [(0, 2), WORKERS]), ids=str)
def test_every_number_of_workers_before_and_after_a_restart_at_every_step(
    reading: Reading, workers: tuple[int, ...]
) -> None:
    for before in workers:
        for after in workers:
            for step in range(STEPS):
                went_on = reading.read(0, before)[:step] + reading.read(step, after)
                assert went_on == reading.whole, (before, after, step)


def test_every_number_of_ranks_before_and_after_a_restart_at_every_step(reading: Reading) -> None:
    for before in RANKS:
        for after in RANKS:
            for step in range(STEPS):
                went_on = reading.on_ranks(before, 0)[:step] + reading.on_ranks(after, step)
                assert went_on == reading.whole, (before, after, step)


def test_three_restarts_in_one_epoch(reading: Reading) -> None:
    places = [(0, 1, 1, 2), (1, 2, 2, 1), (2, 4, 4, 0), (4, STEPS, 2, 1)]  # steps from and to, ranks, workers
    went_on = [batch for start, end, ranks, workers in places for batch in reading.on_ranks(ranks, start, end, workers)]
    assert went_on == reading.whole
