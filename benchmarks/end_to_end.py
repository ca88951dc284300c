"""Benchmark of complete commands: `train.py` and open_clip's trainer, ViT-S/32 for 20 steps of 32 pairs from one CSV file on the CPU.

Both read the same rows of --csv with two workers, train in float32 with AdamW and write a checkpoint at the end. They
run in turns, with alternating order. The output is the median of the samples per second after the fifth step, the time
of the whole process from its start to its end, and the ratios of medians over the pairs of runs.

    python benchmarks/end_to_end.py --csv photographs/train.csv
"""

import argparse
import csv
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from clip_exp.runs import read_metrics

STEPS, BATCH, WORKERS, SKIPPED = 20, 32, 2, 5
REPOSITORY = Path(__file__).resolve().parents[1]


class Timing(NamedTuple):
    samples_per_s: float
    process_s: float


def write_rows(source: Path, target: Path) -> None:
    """Write the first rows of a table with distinct images, with absolute paths, for both trainers."""
    with source.open(newline="", encoding="utf-8") as handle:
        distinct = {row["filepath"]: row for row in csv.DictReader(handle)}
    rows = list(distinct.values())[: STEPS * BATCH]
    if len(rows) < STEPS * BATCH:
        sys.exit(f"{source} has only {len(rows)} images, but {STEPS * BATCH} are needed.")
    with target.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, ["filepath", "title"])
        writer.writeheader()
        for row in rows:
            writer.writerow({"filepath": (source.parent / row["filepath"]).resolve(), "title": row["title"]})


def timed(command: list[str], folder: Path) -> tuple[str, float]:
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": "", "WANDB_MODE": "disabled"}
    started_s = time.perf_counter()
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    seconds = time.perf_counter() - started_s
    if result.returncode:
        sys.exit(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
    return result.stdout + result.stderr, seconds


def ours(pairs: Path, folder: Path) -> Timing:
    overrides = {
        "model": "vit_s32", "data": "csv", "data.train": pairs, "data.num_workers": WORKERS, "max_steps": STEPS, "global_batch_size": BATCH,
        "log_every_n_steps": 1, "trainer.accelerator": "cpu", "precision": "32-true", "trainer.gradient_clip_val": "null",
        "callbacks.progress": "lines", "resume": "never", "output_dir": folder,
    }  # fmt: skip
    command = [sys.executable, str(REPOSITORY / "train.py"), *(f"{key}={value}" for key, value in overrides.items())]
    _, seconds = timed(command, folder)
    rows = read_metrics(max(folder.glob("train/*/*/metrics.csv")))
    return Timing(statistics.median(row["train/samples_per_s"] for row in rows if row["step"] > SKIPPED), seconds)


def theirs(pairs: Path, folder: Path) -> Timing:
    options = {
        "--model": "ViT-S-32", "--train-data": pairs, "--dataset-type": "csv", "--csv-separator": ",", "--batch-size": BATCH, "--epochs": 1,
        "--workers": WORKERS, "--precision": "fp32", "--warmup": 2, "--log-every-n-steps": 1, "--logs": folder,
    }  # fmt: skip
    command = [sys.executable, "-m", "open_clip_train.main", *(str(word) for pair in options.items() for word in pair)]
    output, seconds = timed(command, folder)
    batch_s = [float(value) for value in re.findall(r"Batch \(t\): ([\d.]+)", output)]
    if len(batch_s) < STEPS:
        sys.exit(f"open_clip logged {len(batch_s)} steps:\n{output}")
    return Timing(BATCH / statistics.median(batch_s[SKIPPED:]), seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--csv", type=Path, required=True, help="CSV file with the columns filepath and title, and at least 640 images"
    )
    parser.add_argument("--pairs", type=int, default=3)
    arguments = parser.parse_args()
    timings: dict[str, list[Timing]] = {"clip_exp": [], "open_clip": []}
    sides = {"clip_exp": ours, "open_clip": theirs}
    with tempfile.TemporaryDirectory() as name:
        pairs = Path(name) / "pairs.csv"
        write_rows(arguments.csv, pairs)
        for index in range(arguments.pairs):
            for side in list(sides) if index % 2 == 0 else list(reversed(sides)):
                folder = Path(name) / f"{side}-{index}"
                folder.mkdir()
                timing = sides[side](pairs, folder)
                timings[side].append(timing)
                print(
                    f"pair {index + 1} {side:<9}  {timing.samples_per_s:6.1f} samples/s  {timing.process_s:6.1f} s",
                    flush=True,
                )
    medians = {
        side: Timing(*(statistics.median(column) for column in zip(*rows, strict=True)))
        for side, rows in timings.items()
    }
    mine, peer = medians["clip_exp"], medians["open_clip"]
    print(f"median clip_exp   {mine.samples_per_s:6.1f} samples/s  {mine.process_s:6.1f} s")
    print(f"median open_clip  {peer.samples_per_s:6.1f} samples/s  {peer.process_s:6.1f} s")
    print(
        f"speed {mine.samples_per_s / peer.samples_per_s:.2f}x (target 1.40x), whole process {mine.process_s / peer.process_s:.2f} of its time (target 1.00)"
    )


if __name__ == "__main__":
    main()
