"""Costs and benefits of a block shuffle: correlation of rows in a batch, and locality of reads.

python benchmarks/shuffle.py [rows] [batch] [shuffle_block] [shuffle_window]
"""

import sys
from math import comb
from statistics import mean

from clip_exp.data.randomness import Blocks, Order, epoch_order

IMAGE_KB = 50
# Size of a read of a disk or file system
REGION_MB = 4


def same_block_pairs(order: Order, batch: int, block: int, batches: int = 200) -> float:
    """Return the average number of pairs in a batch whose rows are fewer than `block` rows apart in the table."""
    found = []
    for b in range(batches):
        start = b * (len(order) // batches) // batch * batch
        rows = sorted(order[i] for i in range(start, start + batch))
        found.append(
            sum(other - row < block for i, row in enumerate(rows) for other in rows[i + 1 : i + 1 + 4 * block])
        )
    return mean(found)


def regions(order: Order, reads: int, start: int = 0) -> int:
    """Return the number of regions of the shards that a number of consecutive reads touch."""
    rows_per_region = REGION_MB * 1000 // IMAGE_KB
    return len({order[i] // rows_per_region for i in range(start, start + reads)})


def reused(order: Order, batch: int, cache: int, batches: int = 400) -> float:
    """Return the fraction of reads in the last `cache` regions that were read."""
    rows_per_region = REGION_MB * 1000 // IMAGE_KB
    recent: dict[int, None] = {}
    hits = 0
    for i in range(batch * batches):
        region = order[i] // rows_per_region
        hits += region in recent
        recent.pop(region, None)
        recent[region] = None
        if len(recent) > cache:
            del recent[next(iter(recent))]
    return hits / (batch * batches)


def main() -> None:
    rows, batch, block, window = [*map(int, sys.argv[1:]), *(1_000_000, 256, 256, 64)[len(sys.argv) - 1 :]]
    blocks = Blocks(block, window)
    cache_mb = 2 * block * window * IMAGE_KB // 1000
    print(
        f"{rows:,} rows of {IMAGE_KB} kB ({rows * IMAGE_KB / 1e6:.0f} GB), batches of {batch}, {window} blocks of {block} rows"
    )
    print(f"columns: pairs in a batch (out of {comb(batch, 2):,}) whose rows are fewer than {block} rows apart;")
    print(
        f"regions of {REGION_MB} MB that a batch and {block * window:,} consecutive reads touch; hit rate of a cache of {cache_mb:,} MB"
    )
    for name, order in (("full", epoch_order(rows, 0, 0)), ("block", epoch_order(rows, 0, 0, blocks))):
        pairs = same_block_pairs(order, batch, block)
        touched = regions(order, batch), regions(order, block * window)
        hit_rate = reused(order, batch, cache_mb // REGION_MB)
        print(f"{name:6} {pairs:8.1f} pairs {touched[0]:6} {touched[1]:8} regions {100 * hit_rate:6.1f} %")


if __name__ == "__main__":
    main()
