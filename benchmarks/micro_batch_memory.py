"""Benchmark of the peak memory of one ViT-B/32 step with batch size 256, with and without micro-batches of 32. Also compares the gradients.

Each variant runs in a separate process. The result is the peak of its resident memory during forward and backward minus
the memory before (Linux's VmHWM, reset through /proc/self/clear_refs). Requires Linux and about 12 GB of memory.

    python benchmarks/micro_batch_memory.py
"""

import argparse
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from train_step import make_captions

from clip_exp.config.names import named_model
from clip_exp.losses.softmax.loss import SoftmaxLoss
from clip_exp.models.clip import build_model
from clip_exp.text.tokenizer import Tokenizer

TARGET_RATIO = 2.5
TARGET_GRADIENT_DIFFERENCE = 1e-5


def status_mb(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def measure(batch_size: int, micro_batch_size: int | None, gradients: Path) -> None:
    """Print the MB that one step adds, and write its gradients."""
    torch.set_num_threads(2)
    torch.manual_seed(0)
    model = build_model(named_model("vit_b32"))
    image = torch.randn(batch_size, 3, 224, 224)
    tokens = Tokenizer()(make_captions(batch_size, random.Random(0)))
    ids = torch.arange(batch_size)
    # Resets VmHWM
    Path("/proc/self/clear_refs").write_text("5")
    before_mb = status_mb("VmRSS")
    SoftmaxLoss()(model(image, tokens, micro_batch_size), ids, ids).backward()
    print(status_mb("VmHWM") - before_mb)
    save_file({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, gradients)


def in_child(batch_size: int, micro_batch_size: int | None, gradients: Path) -> float:
    command = [sys.executable, __file__, f"--batch-size={batch_size}", f"--gradients={gradients}"]
    if micro_batch_size is not None:
        command.append(f"--micro-batch-size={micro_batch_size}")
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def compare(batch_size: int, micro_batch_size: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, "full.safetensors"), Path(folder, "micro.safetensors")]
        full_mb = in_child(batch_size, None, files[0])
        micro_mb = in_child(batch_size, micro_batch_size, files[1])
        full, micro = (load_file(file) for file in files)
    largest = max(gradient.abs().max().item() for gradient in full.values())
    difference = max((full[name] - micro[name]).abs().max().item() for name in full) / largest
    print(f"batch of {batch_size} at once:       {full_mb:8,.0f} MB more than before the step")
    print(f"micro-batches of {micro_batch_size}:       {micro_mb:8,.0f} MB")
    print(
        f"ratio: {full_mb / micro_mb:.2f}, largest gradient difference relative to the largest gradient: {difference:.1e}"
    )
    holds = full_mb / micro_mb >= TARGET_RATIO and difference <= TARGET_GRADIENT_DIFFERENCE
    limits = f"ratio >= {TARGET_RATIO}, difference <= {TARGET_GRADIENT_DIFFERENCE:.0e}"
    print(f"target ({limits}): {'met' if holds else 'missed'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--micro-batch-size", type=int)
    parser.add_argument("--gradients", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.gradients:
        measure(args.batch_size, args.micro_batch_size, args.gradients)
    else:
        compare(args.batch_size, args.micro_batch_size or 32)


if __name__ == "__main__":
    main()
