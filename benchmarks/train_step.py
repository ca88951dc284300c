"""Benchmark of a training step of ViT-B/32, ViT-B/16 and RN50 in float32: clip_exp and open_clip_torch, in turns in one process.

Both train the same weights on the same batches with the same loss. clip_exp truncates tokens to the longest caption of
the batch, has one projection for queries, keys and values, computes the last block only for the pooled token, and uses
channels-last convolutions and fused AdamW. open_clip_torch uses 77 tokens and the AdamW of its trainer.

Captions are read from the column `title` of --csv. Without it, they are generated with lengths as in Flickr8k: 14.2
tokens on average, 21 at the 95th percentile, at most 42, including start and end. Images are noise, which does not
affect the time of a step. The two sides run in turns with alternating order, and the result is the median over the
pairs. On a shared machine, only the ratio is meaningful.

    python benchmarks/train_step.py --pairs 9 --csv captions.csv
    python benchmarks/train_step.py --models rn50 --batch-size 8
"""

import argparse
import csv
import random
import statistics
import time
from collections.abc import Callable

import open_clip
import torch
from open_clip.loss import ClipLoss
from torch import Tensor, nn

from clip_exp.config.names import named_model
from clip_exp.losses.softmax.loss import SoftmaxLoss
from clip_exp.models.clip import CLIP, build_model
from clip_exp.text.tokenizer import Tokenizer
from clip_exp.weights.names import to_open_clip

TARGET_RATIO = {"vit_b32": 1.4, "vit_b16": 1.0, "rn50": 1.0}
# Batch norm amplifies rounding errors.
TARGET_LOSS_DIFFERENCE = {"vit_b32": 1e-5, "vit_b16": 1e-5, "rn50": 1e-4}
# A learning rate during warm-up
ADAMW = {"lr": 1e-5, "betas": (0.9, 0.98), "eps": 1e-6}
WORDS = "a the two man woman dog child girl boy red blue white black small young old brown green runs stands jumps "
WORDS += "sits plays walks on in with near over through of and at grass water street beach snow ball field bike tree"

Step = Callable[[], float]


def read_captions(path: str, key: str = "title") -> list[str]:
    with open(path, encoding="utf-8", newline="") as file:
        sample = file.read(4096)
        file.seek(0)
        return [row[key] for row in csv.DictReader(file, dialect=csv.Sniffer().sniff(sample, delimiters=",\t;|"))]


def make_captions(count: int, draw: random.Random) -> list[str]:
    """Generate captions from words of one token each; start and end add two tokens."""
    lengths = [min(42, 5 + round(draw.gammavariate(6.5, 1.41))) for _ in range(count)]
    return [" ".join(draw.choices(WORDS.split(), k=length - 2)) for length in lengths]


def decay_groups(model: nn.Module) -> list[dict[str, object]]:
    """Return open_clip's parameter groups, which for this model depend on the number of axes."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.2},
    ]


def train(optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor], logit_scale: Tensor) -> float:
    optimizer.zero_grad()
    value = loss()
    value.backward()
    optimizer.step()
    with torch.no_grad():
        logit_scale.clamp_(0, 4.6052)
    return value.item()


def compare(
    model: CLIP, theirs: nn.Module, image_size: int, captions: list[str], args: argparse.Namespace
) -> list[list[float]]:
    """Return for each pair of steps [seconds of clip_exp, seconds of open_clip, difference of the losses, tokens of clip_exp]."""
    tokenizer, their_tokenizer = Tokenizer(), open_clip.get_tokenizer("ViT-B-32")
    loss, their_loss = SoftmaxLoss(), ClipLoss()
    optimizer = torch.optim.AdamW(decay_groups(model), **ADAMW, fused=True)
    their_optimizer = torch.optim.AdamW(decay_groups(theirs), **ADAMW)
    ids = torch.arange(args.batch_size)
    draw = random.Random(0)
    rows = []
    for pair in range(args.pairs + 1):
        texts = draw.choices(captions, k=args.batch_size)
        image, tokens, their_tokens = (
            torch.randn(args.batch_size, 3, image_size, image_size),
            tokenizer(texts),
            their_tokenizer(texts),
        )

        def our_step() -> float:
            return train(optimizer, lambda: loss(model(image, tokens), ids, ids), model.logit_scale)  # noqa: B023

        def their_step() -> float:
            return train(their_optimizer, lambda: their_loss(*theirs(image, their_tokens)), theirs.logit_scale)  # noqa: B023

        row = timed_in_turn(our_step, their_step, swap=pair % 2 == 1)
        # The first pair is for warm-up.
        if pair > 0:
            rows.append([*row, tokens.shape[1]])
    return rows


def timed_in_turn(ours: Step, theirs: Step, swap: bool) -> list[float]:
    results = {}
    for step in (theirs, ours) if swap else (ours, theirs):
        start = time.perf_counter()
        value = step()
        results[step] = (time.perf_counter() - start, value)
    return [results[ours][0], results[theirs][0], abs(results[ours][1] - results[theirs][1])]


def measure(name: str, captions: list[str], args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    config = named_model(name)
    model = build_model(config)
    their_config = open_clip.get_model_config(config.open_clip_name)
    theirs = open_clip.CLIP(**their_config)
    theirs.load_state_dict(to_open_clip(model.state_dict()))
    rows = compare(model, theirs, config.image.image_size, captions, args)
    ours_s, theirs_s = (statistics.median(row[side] for row in rows) for side in (0, 1))
    ratio, difference = theirs_s / ours_s, max(row[2] for row in rows)
    print(
        f"{name}, batch {args.batch_size}; tokens per batch, median: {statistics.median(row[3] for row in rows):.0f} of 77"
    )
    print(f"  clip_exp:        {ours_s:6.2f} s per step, {args.batch_size / ours_s:5.2f} pairs/s")
    print(f"  open_clip_torch: {theirs_s:6.2f} s per step, {args.batch_size / theirs_s:5.2f} pairs/s")
    print(f"  ratio of the medians: {ratio:.2f}, largest |loss difference|: {difference:.1e}")
    least, most = TARGET_RATIO[name], TARGET_LOSS_DIFFERENCE[name]
    holds = ratio >= least and difference <= most
    print(f"  target (ratio >= {least}, difference <= {most:.0e}): {'met' if holds else 'missed'}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(TARGET_RATIO), choices=list(TARGET_RATIO))
    parser.add_argument("--pairs", type=int, default=9, help="number of pairs of steps after one for warm-up")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--csv", help="table with captions in the column `title`; default: generated captions")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    captions = read_captions(args.csv) if args.csv else make_captions(10_000, random.Random(0))
    for name in args.models:
        measure(name, captions, args)


if __name__ == "__main__":
    main()
