"""Benchmark of opening tables with millions of rows, and of the memory of workers: clip_exp and open_clip's CsvDataset.

A CSV file with about 90 bytes per row is written to a temporary folder. Each side opens it in a separate process, which
then forks workers that read the path and the caption of every row, as DataLoader workers do in an epoch. The private
memory of a worker is the increase of Private_Clean + Private_Dirty in /proc/<pid>/smaps_rollup (Linux) while all
workers are alive. Pages of a mapped file that several processes read are not private. clip_exp opens the table twice:
cold (building the index) and warm (with an existing index).

    python benchmarks/tables.py --rows 1000000
    python benchmarks/tables.py --rows 10000000 --their-workers 1

open_clip needs about 1 GB per million rows with four workers, 0.5 GB with one.
"""

import argparse
import json
import multiprocessing
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

from micro_batch_memory import status_mb

TARGET_WARM_S = 2.0
TARGET_MB_PER_MILLION = 5.0
WORDS = """a the man woman child dog cat two people riding standing on in front of beach street table with red blue small old
photograph bicycle umbrella kitchen window train grass snow, near holding looking while water building"""

# Function that reads a row and returns the number of characters of its path and caption
Read = Callable[[int], int]


def write_table(file: Path, rows: int) -> None:
    draw = random.Random(0)
    words = WORDS.split()
    captions = [" ".join(draw.choices(words, k=11)) for _ in range(10_000)]
    quoted = [f'"{caption}"' if "," in caption else caption for caption in captions]
    with file.open("w", encoding="utf-8") as stream:
        stream.write("filepath,title\n")
        for start in range(0, rows, 10_000):
            lines = [
                f"images/{row // 1000:06d}/{row:09d}.jpg,{draw.choice(quoted)}\n"
                for row in range(start, min(rows, start + 10_000))
            ]
            stream.writelines(lines)


def open_ours(file: Path) -> tuple[int, Read]:
    from clip_exp.data.tables.open import open_table
    from clip_exp.data.tables.reader import TableOptions

    table = open_table(file, TableOptions(), index_dir=file.parent / "index")
    return len(table), lambda row: len(table.path(row)) + len(table.caption(row))


def open_theirs(file: Path) -> tuple[int, Read]:
    from open_clip_train.data import CsvDataset

    data = CsvDataset(str(file), None, "filepath", "title", sep=",")
    return len(data), lambda row: len(str(data.images[row])) + len(str(data.captions[row]))


def import_side(side: str) -> None:
    """Import a library before the measurement, so that only opening the table is timed."""
    if side == "ours":
        pass
    else:
        import open_clip_train.data  # noqa: F401


def private_mb() -> float:
    lines = [line.split() for line in Path("/proc/self/smaps_rollup").read_text().splitlines()]
    return sum(int(line[1]) for line in lines if line[0] in ("Private_Clean:", "Private_Dirty:")) / 1024


def work(rows: int, read: Read, barrier: Barrier, added_mb: Any) -> None:
    barrier.wait()
    before_mb = private_mb()
    characters = 0
    for row in range(rows):
        characters += read(row)
    barrier.wait()
    added_mb.put(private_mb() - before_mb)
    barrier.wait()


def measure_workers(rows: int, read: Read, count: int) -> list[float]:
    """Return the private memory in MB that each worker has added."""
    context = multiprocessing.get_context("fork")
    barrier, added_mb = context.Barrier(count), context.SimpleQueue()
    workers = [context.Process(target=work, args=(rows, read, barrier, added_mb)) for _ in range(count)]
    for worker in workers:
        worker.start()
    found = [added_mb.get() for _ in workers]
    for worker in workers:
        worker.join()
    return found


def serve(side: str, file: Path, workers: int) -> None:
    """Print one measurement: seconds to open the table, MB in the process, MB per worker and million rows."""
    import_side(side)
    before_mb, started_s = status_mb("VmRSS"), time.perf_counter()
    rows, read = (open_ours if side == "ours" else open_theirs)(file)
    opened_s, opened_mb = time.perf_counter() - started_s, status_mb("VmRSS") - before_mb
    peak_mb = status_mb("VmHWM") - before_mb
    worker_mb = statistics.mean(measure_workers(rows, read, workers)) / rows * 1e6 if workers else 0.0
    print(json.dumps({"opened_s": opened_s, "opened_mb": opened_mb, "peak_mb": peak_mb, "worker_mb": worker_mb}))


def in_child(side: str, file: Path, workers: int) -> dict[str, float]:
    command = [sys.executable, __file__, f"--serve={side}", f"--file={file}", f"--workers={workers}"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def describe(label: str, found: dict[str, float]) -> str:
    return f"{label:<22} {found['opened_s']:7.2f} s, {found['opened_mb']:7.0f} MB more, {found['peak_mb']:7.0f} MB at the peak"


def compare(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "pairs.csv")
        write_table(file, args.rows)
        print(f"{args.rows:,} rows, {file.stat().st_size / 1e6:,.0f} MB")
        cold = in_child("ours", file, 0)
        warm = in_child("ours", file, args.workers)
        print(describe("clip_exp, cold:", cold))
        print(describe("clip_exp, warm:", warm))
        theirs = in_child("theirs", file, args.their_workers) if args.their_workers else None
    if theirs is not None:
        print(describe("open_clip:", theirs))
    print("Private memory that a worker adds per million rows, after reading all of them:")
    print(f"clip_exp               {warm['worker_mb']:7.2f} MB ({args.workers} workers)")
    if theirs is not None:
        ratio = theirs["worker_mb"] / max(warm["worker_mb"], 0.01)
        print(
            f"open_clip              {theirs['worker_mb']:7.2f} MB ({args.their_workers} workers), {ratio:,.0f} times as much"
        )
    good = warm["opened_s"] <= TARGET_WARM_S and warm["worker_mb"] <= TARGET_MB_PER_MILLION
    targets = f"warm <= {TARGET_WARM_S} s, <= {TARGET_MB_PER_MILLION} MB per million rows and worker"
    print(f"target ({targets}): {'met' if good else 'missed'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--their-workers", type=int, help="workers of open_clip; 0: skip it; default: as --workers")
    parser.add_argument("--serve", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.their_workers is None:
        args.their_workers = args.workers
    if args.serve:
        serve(args.serve, args.file, args.workers)
    else:
        compare(args)


if __name__ == "__main__":
    main()
