"""Benchmark of the tokenizer on one core: clip_exp and open_clip's `SimpleTokenizer`, in turns in one process.

There are two cases. Sample by sample, as in data loading: open_clip's `CsvDataset` calls `tokenizer([caption])[0]` for
every sample and stacks the batch, while clip_exp encodes every sample and pads the batch. And whole batches at once, as
for the prompts of a classifier. Both sides cache words, so each case is measured twice: cold, with an empty cache, and
warm, with the same captions again. The ids must be equal. Plain captions are read from a table or generated; messy
captions, a tenth as many, are derived from them.

    python benchmarks/tokenizer.py --csv $CLIP_EXP_DATA/flickr8k/train.csv
"""

import argparse
import csv
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor

from clip_exp.text import tokenizer as ours
from clip_exp.text.tokenizer import Tokenizer

TARGET_RATIO = 2.5
BATCH_SIZE = 256
WORDS = [
    "a",
    "the",
    "of",
    "in",
    "on",
    "with",
    "two",
    "three",
    "small",
    "large",
    "young",
    "old",
    "black",
    "white",
    "red",
    "brown",
    "dog",
    "cat",
    "man",
    "woman",
    "child",
    "girl",
    "boy",
    "bird",
    "horse",
    "running",
    "sitting",
    "standing",
    "jumping",
    "playing",
    "holding",
    "wearing",
    "looking",
    "through",
    "behind",
    "across",
    "under",
    "grass",
    "water",
    "street",
    "beach",
    "snow",
    "ball",
    "bicycle",
    "skateboard",
    "camera",
    "mountain",
    "building",
    "window",
    "crowd",
    "football",
    "guitar",
    "umbrella",
    "sunglasses",
]
MESSES: list[Callable[[str], str]] = [
    lambda caption: f"{caption} 😀👍🏽 #{caption.split()[0]} 👩‍👩‍👧‍👦",
    lambda caption: f"Café Zoë à Málaga — {caption.title()}, 3½ €",
    lambda caption: f"{caption} &amp; more &lt;b&gt;here&lt;/b&gt; &#39;now&#39; &amp;nbsp;",
    lambda caption: f"一只猫坐在垫子上。{caption} 日本語の写真 한국어",
    lambda caption: f"“{caption}” — it’s ‘new’…",
    lambda caption: f"\t{caption}\x00\r\n\x1b[31m{caption}\x1b[0m\u200b",
    lambda caption: f"{caption} مرحبا بالعالم שלום мир κόσμος",
    lambda caption: f"{caption} schÃ¶n â€œquotedâ€\x9d fiancÃ©e",
    lambda caption: f"DSC_{len(caption):04d}.JPG | {caption}!!! http://x.org/?q=1 $9.99 100% O'Neill's",
    lambda caption: " ".join([caption] * 20),
]  # fmt: skip


def read_captions(file: Path | None, count: int) -> list[str]:
    """Read plain captions from a table, or generate them if there is none."""
    if file is None:
        draw = random.Random(0)
        return [" ".join(draw.choices(WORDS, k=draw.randrange(6, 18))).capitalize() + " ." for _ in range(count)]
    with file.open(newline="", encoding="utf-8") as stream:
        return [record["title"] for record in csv.DictReader(stream)][:count]


def make_messy(captions: list[str]) -> list[str]:
    """Derive one messy caption from every tenth plain caption, of each kind in turn."""
    return [MESSES[i % len(MESSES)](caption) for i, caption in enumerate(captions[::10])]


def batches(captions: list[str]) -> list[list[str]]:
    return [captions[start : start + BATCH_SIZE] for start in range(0, len(captions), BATCH_SIZE)]


def samples_of_ours(tokenizer: Tokenizer, captions: list[str]) -> list[Tensor]:
    return [tokenizer.pad([tokenizer.encode(caption) for caption in batch]) for batch in batches(captions)]


def samples_of_theirs(tokenizer: SimpleTokenizer, captions: list[str]) -> list[Tensor]:
    return [torch.stack([tokenizer([caption])[0] for caption in batch]) for batch in batches(captions)]


def whole_batches(tokenizer: Tokenizer | SimpleTokenizer, captions: list[str]) -> list[Tensor]:
    return [tokenizer(batch) for batch in batches(captions)]


PATHS = {
    "sample by sample": (samples_of_ours, samples_of_theirs),
    "whole batches": (whole_batches, whole_batches),
}


def seconds(path: Callable[..., list[Tensor]], tokenizer: Tokenizer | SimpleTokenizer, captions: list[str]) -> float:
    start = time.process_time()
    path(tokenizer, captions)
    return time.process_time() - start


def forgetful() -> tuple[Tokenizer, SimpleTokenizer]:
    """Return both tokenizers with loaded vocabulary and empty word caches."""
    # The cache is shared by all tokenizers of a process.
    ours._word_ids.cache_clear()
    tokenizer = Tokenizer()
    tokenizer.encode("")
    return tokenizer, SimpleTokenizer()


def require_equal_ids(captions: list[str]) -> None:
    tokenizer, reference = forgetful()
    for batch in batches(captions):
        found, expected = tokenizer(batch, trim=False), reference(batch)
        for caption, mine, theirs in zip(batch, found, expected, strict=True):
            assert torch.equal(mine, theirs), f"ids differ: {caption!r}"


def compare(captions: list[str], pairs: int) -> dict[tuple[str, str], tuple[float, float]]:
    """Return the median seconds of both sides for each case and state of the cache."""
    took: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for _ in range(pairs):
        for name, paths in PATHS.items():
            tokenizers = forgetful()
            for state in ("cold", "warm"):
                pair = [seconds(path, tokenizer, captions) for path, tokenizer in zip(paths, tokenizers, strict=True)]
                took.setdefault((name, state), []).append((pair[0], pair[1]))
    return {
        key: (statistics.median(mine for mine, _ in rows), statistics.median(theirs for _, theirs in rows))
        for key, rows in took.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--csv", type=Path, help="table with captions in the column `title`; default: generated captions"
    )
    parser.add_argument("--count", type=int, default=10_000, help="number of plain captions")
    parser.add_argument("--pairs", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    plain = read_captions(args.csv, args.count)
    messy = make_messy(plain)
    require_equal_ids(plain + messy)
    print(f"{len(plain):,} plain captions and {len(messy):,} messy ones: all ids equal; captions/s on one core")
    ratios = []
    for what, captions in {"plain": plain, "messy": messy, "both": plain + messy}.items():
        for (name, state), (mine_s, theirs_s) in compare(captions, args.pairs).items():
            print(
                f"{what}, {name}, {state}:".ljust(32)
                + f"clip_exp {len(captions) / mine_s:9,.0f}   open_clip_torch {len(captions) / theirs_s:9,.0f}   "
                + f"ratio {theirs_s / mine_s:4.1f}"
            )
            if what == "both":
                ratios.append(theirs_s / mine_s)
    print(f"target (ratio >= {TARGET_RATIO} on both): {'met' if min(ratios) >= TARGET_RATIO else 'missed'}")


if __name__ == "__main__":
    main()
