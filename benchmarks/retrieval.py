"""Benchmark of retrieval metrics: ranks of 5,000 images and 5,000 captions in both directions, clip_exp and open_clip's trainer.

Each side runs in a separate process that makes one measurement at a time. The memory is the peak of resident memory
during the call minus the memory before (Linux's VmHWM, reset through /proc/self/clear_refs). clip_exp counts higher
scores in tiles; open_clip sorts the whole matrix twice. There is one caption per image, since open_clip's metric
supports no more. Both sides use the same features.

    python benchmarks/retrieval.py --pairs 5
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from micro_batch_memory import status_mb
from torch import Tensor
from torch.nn import functional as F

TARGET_RATIO = 10.0
WAYS = {"i2t": "image_to_text", "t2i": "text_to_image"}


def make_features(count: int, dim: int = 512) -> tuple[Tensor, Tensor]:
    """Return features of pairs with similarities as those of a small model: some pairs have rank 1, others high ranks."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(count, dim, generator=generator)
    text = image + 4 * torch.rand(count, 1, generator=generator) * torch.randn(count, dim, generator=generator)
    return F.normalize(image, dim=-1), F.normalize(text, dim=-1)


def serve(side: str, count: int, threads: int) -> None:
    """Print one measurement for every line of input: seconds, MB, and the metrics."""
    torch.set_num_threads(threads)
    image, text = make_features(count)
    if side == "ours":
        from clip_exp.evaluation.retrieval import retrieval

        own = torch.arange(count)
        measure = lambda: retrieval(image, text, own)  # noqa: E731
    else:
        from open_clip_train.train import get_clip_metrics

        measure = lambda: get_clip_metrics(image, text, torch.tensor(100.0))  # noqa: E731
    print("ready", flush=True)
    for _ in sys.stdin:
        Path("/proc/self/clear_refs").write_text("5")
        before_mb, start = status_mb("VmRSS"), time.perf_counter()
        metrics = measure()
        took_s = time.perf_counter() - start
        values = [
            metrics[f"recall@{k}_{way}"] if side == "ours" else metrics[f"{name}_R@{k}"]
            for way, name in WAYS.items()
            for k in (1, 5, 10)
        ] + [
            metrics[f"median_rank_{way}"] if side == "ours" else metrics[f"{name}_median_rank"]
            for way, name in WAYS.items()
        ]
        print(took_s, status_mb("VmHWM") - before_mb, *map(float, values), flush=True)


class Side:
    """Child process that makes measurements on request."""

    def __init__(self, side: str, args: argparse.Namespace) -> None:
        command = [sys.executable, __file__, f"--serve={side}", f"--count={args.count}", f"--threads={args.threads}"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def measure(self) -> list[float]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(file=self.process.stdin, flush=True)
        return [float(value) for value in self.process.stdout.readline().split()]

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def compare(args: argparse.Namespace) -> None:
    sides = {name: Side(name, args) for name in ("ours", "theirs")}
    rows: dict[str, list[list[float]]] = {"ours": [], "theirs": []}
    for pair in range(args.pairs + 1):
        for name in sorted(sides, reverse=pair % 2 == 1):
            rows[name].append(sides[name].measure())
    for side in sides.values():
        side.end()
    seconds = {name: statistics.median(row[0] for row in found[1:]) for name, found in rows.items()}
    # Memory of the first call, since later ones reuse memory of the process.
    memory_mb = {name: found[0][1] for name, found in rows.items()}
    equal = all(ours[2:] == theirs[2:] for ours, theirs in zip(rows["ours"], rows["theirs"], strict=True))
    labels = {"ours": "clip_exp:", "theirs": "open_clip_torch:"}
    print(f"{args.count:,} images, {args.count:,} captions; recall@1, 5, 10 and median rank in both directions")
    for name, label in labels.items():
        print(f"{label:<16} {seconds[name]:7.3f} s, {memory_mb[name]:7.0f} MB more at the peak")
    ratio = seconds["theirs"] / seconds["ours"]
    print(f"ratio of the medians: {ratio:.1f}, of the memory: {memory_mb['theirs'] / memory_mb['ours']:.1f}")
    print(f"all eight numbers equal: {'yes' if equal else 'no'}")
    print(f"target (ratio >= {TARGET_RATIO}, equal ranks): {'met' if ratio >= TARGET_RATIO and equal else 'missed'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5, help="number of measurements after one for warm-up")
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--serve", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, args.count, args.threads)
    else:
        compare(args)


if __name__ == "__main__":
    main()
