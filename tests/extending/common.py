"""Data, commands and modules of users, for the tests of objects that a configuration names by `_target_`."""

import csv
import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.conftest import DOOR, REPOSITORY, Run
from tests.runs import run_folders
from tests.small_runs import write_image

EXAMPLES = REPOSITORY / "examples" / "extending"
EXTENDED = ("--config-dir", str(EXAMPLES / "conf"))
# A run without its data
SMALL = (
    "model=vit_nano", "global_batch_size=8", "data.num_workers=0", "precision=32-true", "trainer.accelerator=cpu",
    "optimizer.lr=1e-3", "log_every_n_steps=1", "resume=never",
)  # fmt: skip
DIGITS = ("data=digits", "data.generate.rows=48", "data.generate.val_rows=16")
COLORS = ("red", "green", "blue", "gray")


def write_pairs(folder: Path, images: int = 12) -> Path:
    """Write images, and pairs.csv and pairs.parquet with two rows per image; return the folder.

    Columns: filepath, title, hard_negative, and teacher_features (a list of four numbers) in the Parquet file.
    """
    draw = np.random.default_rng(0)
    rows = []
    for i in range(images):
        write_image(folder / f"{i}.png", i)
        features = draw.normal(size=4).round(4).tolist()
        for word in ("photo", "picture"):
            color, other = COLORS[i % 4], COLORS[(i + 1) % 4]
            rows.append((f"{i}.png", f"a {word} of a {color} {i}", f"a {word} of a {other} {i} and more", features))
    with (folder / "pairs.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("filepath", "title", "hard_negative"), *(row[:3] for row in rows)])
    names = ("filepath", "title", "hard_negative", "teacher_features")
    pq.write_table(
        pa.table(dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))), folder / "pairs.parquet"
    )
    return folder


def write_photos(folder: Path, images: int = 12) -> Path:
    """Write images, each with a text file with two captions; return the folder."""
    for i in range(images):
        write_image(folder / f"{i:02}.png", i)
        (folder / f"{i:02}.txt").write_text(f"a {COLORS[i % 4]} {i}\na photo of {i}\n")
    return folder


def csv_of(pairs: Path) -> tuple[str, ...]:
    return "data=csv", f"data.train={pairs / 'pairs.csv'}", f"data.val={pairs / 'pairs.csv'}"


def parquet_of(pairs: Path) -> tuple[str, ...]:
    return "data=csv", f"data.train={pairs / 'pairs.parquet'}", f"data.val={pairs / 'pairs.parquet'}"


def typed(command: Run, line: str, cwd: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """Type a printed command in a folder."""
    words = shlex.split(line)
    start = next(
        i
        for i, word in enumerate(words)
        if word in ("clip_exp", "clip-exp") or word.endswith(("train.py", "evaluate.py"))
    )
    if words[start] in ("clip_exp", "clip-exp"):
        return command(DOOR, *words[start + 1 :], *more, cwd=cwd)
    return command(Path(words[start]).name, *words[start + 1 :], *more, cwd=cwd)


def after(label: str, text: str) -> str:
    """Return the command that follows a label at the start of a line."""
    found = re.search(rf"^\s*{re.escape(label)}\s*(.+)$", text, re.MULTILINE)
    assert found, text
    return found[1]


def only_run(cwd: Path) -> Path:
    (folder,) = run_folders(cwd / "outputs")
    return folder
