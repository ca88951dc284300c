"""Benchmark of the training throughput on one GPU: the samples per second in metrics.csv and by the wall clock, eager and compiled.

Each run is `train.py` with the images of `data=shapes`, which are fast to decode, in bf16. The first steps (--skip) are
not measured, since workers start and towers are compiled in them. The wall-clock time is measured between the ends of
two logged steps, after synchronizing the GPU; the reported time is that of the rows between these steps.

    python benchmarks/gpu_throughput.py
    python benchmarks/gpu_throughput.py --runs vit_b32:128 rn50:256 --workers 8 --steps 200
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch

from clip_exp.runs import read_metrics

REPOSITORY = Path(__file__).resolve().parents[1]
# Maximum relative difference between reported and wall-clock throughput
TARGET_DIFFERENCE = 0.05
LOG_EVERY = 10


class WallClock(pl.Callback):
    """Callback that writes the seconds between the ends of the steps `first` and `last` to a file.

    Args:
        file: path of the file.
        first, last: logged steps.
    """

    def __init__(self, file: str, first: int, last: int) -> None:
        self.file, self.first, self.last = file, first, last
        self._started_s = 0.0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step not in (self.first, self.last):
            return
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
        if trainer.global_step == self.first:
            self._started_s = time.perf_counter()
        else:
            Path(self.file).write_text(json.dumps(time.perf_counter() - self._started_s), encoding="utf-8")


class Measured(NamedTuple):
    """Result of a run.

    Attributes:
        reported: samples per second in metrics.csv.
        wall: samples per second by the wall clock.
        waiting: fraction of the reported time that training waited for data.
        peak_gb: peak memory of the GPU in GB.
    """

    reported: float
    wall: float
    waiting: float
    peak_gb: float | None


def measure(model: str, batch_size: int, compiled: bool, arguments: argparse.Namespace, data: Path) -> Measured:
    """Train once in a temporary folder."""
    first, last = arguments.skip, arguments.skip + arguments.steps
    with tempfile.TemporaryDirectory(dir=data) as name:
        folder = Path(name)
        (folder / "data").symlink_to(data / "data")
        wall = folder / "wall.json"
        overrides = [
            f"model={model}", f"global_batch_size={batch_size}", f"compile={str(compiled).lower()}", "data=shapes",
            f"data.generate.rows={arguments.rows}", "data.generate.val_rows=64", f"data.num_workers={arguments.workers}",
            f"max_steps={last}", f"log_every_n_steps={LOG_EVERY}", "val_every_n_steps=1000000",
            "checkpoint_every_n_steps=1000000", "precision=bf16-mixed", f"trainer.accelerator={arguments.accelerator}",
            "callbacks.progress=none", "resume=never", f"output_dir={folder}",
            f"callbacks.extra.wall={{_target_: gpu_throughput.WallClock, file: '{wall}', first: {first}, last: {last}}}",
        ]  # fmt: skip
        paths = [str(REPOSITORY), str(REPOSITORY / "benchmarks"), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "CLIP_EXP_ALLOWED_TARGETS": "gpu_throughput",
        }
        command = [sys.executable, str(REPOSITORY / "train.py"), *overrides]
        result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        if result.returncode:
            sys.exit(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
        wall_s = json.loads(wall.read_text(encoding="utf-8"))
        rows = read_metrics(next(folder.glob("train/*/*/metrics.csv")))
    between = [row for row in rows if first < row["step"] <= last and "train/samples_per_s" in row]
    reported_s = sum(LOG_EVERY * batch_size / row["train/samples_per_s"] for row in between)
    waited_s = sum(LOG_EVERY * row["train/data_wait_s"] for row in between)
    samples = arguments.steps * batch_size
    peak_gb = max((row["train/peak_memory_gb"] for row in between if "train/peak_memory_gb" in row), default=None)
    return Measured(samples / reported_s, samples / wall_s, waited_s / reported_s, peak_gb)


def line(name: str, measured: Measured) -> str:
    difference = measured.reported / measured.wall - 1
    verdict = "" if abs(difference) <= TARGET_DIFFERENCE else f", more than {100 * TARGET_DIFFERENCE:.0f} %"
    peak = "" if measured.peak_gb is None else f", peak {measured.peak_gb:.1f} GB"
    return (
        f"  {name:<8}  reported {measured.reported:9,.1f} samples/s, wall {measured.wall:9,.1f} samples/s "
        f"({100 * difference:+.1f} %{verdict}), waiting for data {100 * measured.waiting:.0f} %{peak}"
    )


def run_of(text: str) -> tuple[str, int]:
    model, _, batch_size = text.partition(":")
    return model, int(batch_size)


def steps_of(text: str) -> int:
    steps = int(text)
    if steps <= 0 or steps % LOG_EVERY:
        raise argparse.ArgumentTypeError(f"must be a multiple of {LOG_EVERY}, the steps between rows of metrics")
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--runs", nargs="+", type=run_of, default=[("vit_b32", 128), ("vit_b32", 1024), ("vit_l14", 128)],
        metavar="MODEL:BATCH",
    )  # fmt: skip
    parser.add_argument("--skip", type=steps_of, default=40, help="number of steps before the measured ones")
    parser.add_argument("--steps", type=steps_of, default=100, help="number of measured steps")
    parser.add_argument("--rows", type=int, default=8192, help="number of images, at least the largest batch size")
    parser.add_argument("--workers", default="null", help="data.num_workers")
    parser.add_argument("--accelerator", default="gpu", help="gpu, or cpu to test the script")
    arguments = parser.parse_args()
    if arguments.accelerator != "cpu":
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as name:
        data = Path(name)
        # All runs share the generated images.
        (data / "data").mkdir()
        for model, batch_size in arguments.runs:
            print(f"{model}, batch {batch_size}", flush=True)
            eager = measure(model, batch_size, False, arguments, data)
            print(line("eager", eager), flush=True)
            compiled = measure(model, batch_size, True, arguments, data)
            print(line("compiled", compiled))
            print(f"  compiled / eager by wall clock: {compiled.wall / eager.wall:.2f}", flush=True)


if __name__ == "__main__":
    main()
