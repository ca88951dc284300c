"""A run over real photographs of which some files are broken."""

import csv
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

from clip_exp.data import files
from clip_exp.data.files import kind_of
from tests.runs import Train


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def announce_pixels(file: Path) -> None:
    data = bytearray(file.read_bytes())
    size = max(data.find(start) for start in (b"\xff\xc0", b"\xff\xc2")) + 5
    data[size : size + 4] = b"\xf0\x00\xf0\x00"
    file.write_bytes(data)


BREAK: dict[str, Callable[[Path], object]] = {
    files.NO_SUCH_FILE: Path.unlink,
    files.TRUNCATED: truncate,
    files.EMPTY_FILE: lambda file: os.truncate(file, 0),
    files.NOT_AN_IMAGE: lambda file: file.write_text("<html><body>404 Not Found</body></html>"),
    files.TOO_MANY_PIXELS: announce_pixels,
    files.TOO_MANY_BYTES: lambda file: os.truncate(file, 1 << 33),
}


def test_a_run_over_flickr8k_finishes_and_lists_exactly_the_files_that_were_broken(
    real_data: Path, train: Train, tmp_path: Path
) -> None:
    data = tmp_path / "flickr8k"
    shutil.copytree(real_data / "flickr8k", data)
    with open(data / "train.csv", newline="", encoding="utf-8") as table:
        paths = sorted({record["filepath"] for record in csv.DictReader(table)})
    broken = dict(zip(random.Random(0).sample(paths, len(paths) * 3 // 100), list(BREAK) * len(paths), strict=False))
    for path, kind in broken.items():
        BREAK[kind](data / path)
    run = train(
        "data=csv", f"data.train={data / 'train.csv'}", "model=vit_nano", "epochs=1", "global_batch_size=100",
        "data.num_workers=2", "trainer.accelerator=cpu", "precision=32-true", "log_every_n_steps=1",
    )  # fmt: skip
    assert run.record["status"] == "finished"
    assert len(run.losses) == len(paths) // 100
    with open(run.folder / "bad_samples.csv", newline="", encoding="utf-8") as table:
        listed = [(record["path"], kind_of(record["reason"])) for record in csv.DictReader(table)]
    assert sorted(listed) == sorted(broken.items())
