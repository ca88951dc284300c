"""Benchmark of the image pipeline: clip_exp and open_clip's CSV dataset with its training transform, in turns in one process.

200 photographs of about 500 x 375 pixels and 40 of 1,600 pixels are written as JPEG files, made from those in --images
or generated. The JPEG quality of 85 gives about 2 bits per pixel at 500 x 375, as the median JPEG of that size on the
web (2.07; HTTP Archive, 2024). With more bits, more of the time is spent in Huffman decoding, which is the same on both
sides. With --images, the original files are measured too, without a target.

Both sides produce complete samples from the same table, from path to pixels and from caption to ids. clip_exp decodes
with torchcodec, crops, resizes bytes and normalizes on the device (timed separately). open_clip decodes, crops and
resizes with Pillow and normalizes floats. The first measurement is the CPU time on one core, the second the wall-clock
time with two DataLoader workers; both are medians over the rounds. The last output is the largest difference of a pixel
for the same crop, in levels of 255.

    python benchmarks/image_pipeline.py --images $CLIP_EXP_DATA/imagenet_val_sample
"""

import argparse
import csv
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import open_clip
import torch
from open_clip_train.data import CsvDataset
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader

from clip_exp.config.data import AugmentationConfig, DataConfig
from clip_exp.data.datamodule import PairsDataModule
from clip_exp.data.files import ImageLimits, read_file
from clip_exp.data.images import crop_box, decode_rgb, normalize, preprocessing_of, train_transform
from clip_exp.data.randomness import Draws
from clip_exp.models.families.clip import ViTConfig
from clip_exp.text.tokenizer import Tokenizer

# Longer side in pixels, number of images, target ratio
SETS = {"500 px": (500, 200, 2.5), "1600 px": (1600, 40, 2.0)}
ORIGINAL = "original files"
SIZE = 224
CAPTION = "A little girl in a red dress climbs a rope while her dog waits in the grass."
# Number of images that the workers load in a round
LOADED = 800


def draw_photograph(seed: int) -> Image.Image:
    """Generate an image of noise whose amplitude decreases with frequency, as in photographs, and shapes with sharp edges."""
    draw = np.random.default_rng(seed)
    width, height = (1600, 1200) if seed % 3 else (1200, 1600)
    pixels = np.zeros((height, width, 3), dtype=np.float32)
    for cells, strength in ((4, 60), (12, 40), (40, 25), (130, 14), (400, 8), (1600, 4)):
        noise = draw.normal(0, 1, (cells * height // width, cells, 3)) * [1, 0.8, 0.7]
        # Mostly gray
        noise += draw.normal(0, 1, noise.shape[:2])[..., None]
        planes = [
            Image.fromarray(plane).resize((width, height)) for plane in noise.astype(np.float32).transpose(2, 0, 1)
        ]
        pixels += strength / 2 * np.stack([np.asarray(plane) for plane in planes], axis=-1)
    image = Image.fromarray((pixels + 120).clip(0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for _ in range(12):
        left, top = draw.integers(0, width), draw.integers(0, height)
        box = (left, top, left + draw.integers(20, 400), top + draw.integers(20, 400))
        pen.ellipse(box, outline=tuple(draw.integers(0, 256, 3).tolist()), width=9)
    return image


def find_photographs(folder: str | None) -> list[Path]:
    found = (
        sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in (".jpg", ".jpeg")) if folder else []
    )
    if folder and not found:
        raise SystemExit(f"--images={folder} has no .jpg or .jpeg files.")
    return found


def write_table(folder: Path, paths: list[Path]) -> Path:
    """Write a table with absolute paths, since open_clip reads relative paths from the current folder."""
    with open(folder / "pairs.csv", "w", newline="") as file:
        csv.writer(file).writerows([("filepath", "title"), *((str(path), CAPTION) for path in paths)])
    return folder / "pairs.csv"


def make_photographs(folder: Path, side: int, count: int, photographs: list[Path], quality: int) -> Path:
    """Write `count` images with the longer side `side`, and return a table of them."""
    folder.mkdir()
    paths = []
    for i in range(count):
        image = Image.open(photographs[i % len(photographs)]) if photographs else draw_photograph(i % 20)
        factor = side / max(image.size)
        image = image.convert("RGB").resize([round(factor * length) for length in image.size], Image.Resampling.LANCZOS)
        paths.append(folder / f"{i:03d}.jpg")
        image.save(paths[-1], quality=quality)
    return write_table(folder, paths)


def our_module(table: Path, batch_size: int, steps: int, workers: int) -> PairsDataModule:
    config = DataConfig(name="csv", train=str(table), num_workers=workers)
    return PairsDataModule(
        config,
        preprocessing=preprocessing_of(ViTConfig(image_size=SIZE, patch_size=8, width=8, layers=1, heads=1)),
        tokenizer=Tokenizer(77),
        global_batch_size=batch_size,
        total_steps=steps,
        output_dir=table.parent,
    )


def our_samples(table: Path) -> Callable[[int], object]:
    return our_module(table, 1, 1, 0).train_dataloader().loader.dataset.__getitem__


def their_dataset(table: Path) -> CsvDataset:
    transform = open_clip.image_transform(SIZE, is_train=True)
    return CsvDataset(str(table), transform, "filepath", "title", ",", open_clip.get_tokenizer("ViT-B-32"))


def cpu_ms(sample: Callable[[int], object], count: int) -> float:
    start = time.process_time()
    for i in range(count):
        sample(i)
    return (time.process_time() - start) / count * 1e3


def wall_ms(batches: Iterator[object], batch_size: int) -> float:
    """Return the milliseconds per image, without the first batch, which waits for the workers to start."""
    next(batches)
    start = time.perf_counter()
    count = sum(1 for _ in batches)
    return (time.perf_counter() - start) / (count * batch_size) * 1e3


def our_batches(table: Path, batch_size: int) -> Iterator[object]:
    return iter(our_module(table, batch_size, LOADED // batch_size, 2).train_dataloader())


def their_batches(table: Path, batch_size: int) -> Iterator[object]:
    """Return batches of open_clip's data set, repeated to the required number of samples, since its loader ends after an epoch."""
    dataset = their_dataset(table)
    several = torch.utils.data.Subset(dataset, [i % len(dataset) for i in range(LOADED)])
    return iter(DataLoader(several, batch_size, shuffle=True, num_workers=2, drop_last=True))


def compare(table: Path, args: argparse.Namespace) -> dict[str, list[float]]:
    """Return the milliseconds per image of both sides, on one core and with two workers."""
    ours, theirs = our_samples(table), their_dataset(table)
    measures = {
        "core": (lambda: cpu_ms(ours, len(theirs)), lambda: cpu_ms(theirs.__getitem__, len(theirs))),
        "workers": (
            lambda: wall_ms(our_batches(table, args.batch_size), args.batch_size),
            lambda: wall_ms(their_batches(table, args.batch_size), args.batch_size),
        ),
    }
    medians = {}
    for name, sides in measures.items():
        found: tuple[list[float], list[float]] = ([], [])
        # The first round on one core is for warm-up.
        for round_ in range(args.rounds + (name == "core")):
            for side in (1, 0) if round_ % 2 else (0, 1):
                found[side].append(sides[side]())
        medians[name] = [statistics.median(times[name == "core" :]) for times in found]
    return medians


def largest_difference(table: Path) -> tuple[int, float]:
    """Return the largest and the mean difference of a pixel to the same crop by Pillow, in levels."""
    largest, means, augmentation = 0, [], AugmentationConfig()
    for record in list(csv.DictReader(table.read_text().splitlines()))[:40]:
        path = record["filepath"]
        image = decode_rgb(read_file(path, ImageLimits()), ImageLimits())
        top, left, height, width = crop_box(*image.shape[1:], Draws(0), augmentation.scale, augmentation.ratio)
        with Image.open(path) as opened:
            crop = opened.convert("RGB").crop((left, top, left + width, top + height))
        theirs = np.asarray(crop.resize((SIZE, SIZE), Image.Resampling.BICUBIC)).transpose(2, 0, 1).astype(int)
        difference = np.abs(train_transform(image, SIZE, Draws(0), augmentation).numpy() - theirs)
        largest = max(largest, int(difference.max()))
        means.append(float(difference.mean()))
    return largest, statistics.mean(means)


def report(name: str, table: Path, args: argparse.Namespace) -> None:
    paths = [Path(record["filepath"]) for record in csv.DictReader(table.read_text().splitlines())]
    bits = 8 * sum(path.stat().st_size for path in paths) / sum(np.prod(Image.open(path).size) for path in paths)
    print(f"{name}: {len(paths)} images, {bits:.2f} bits per pixel; ms per image")
    target = SETS[name][2] if name in SETS else None
    for where, (ours, theirs) in compare(table, args).items():
        label = "one core" if where == "core" else "two workers"
        print(f"  {label:<12} clip_exp {ours:6.2f}   open_clip {theirs:6.2f}   ratio {theirs / ours:.2f}", end="")
        print(f"   (target {target}: {'met' if theirs / ours >= target else 'missed'})" if target else "", flush=True)
    largest, mean = largest_difference(table)
    print(f"  largest difference of a pixel {largest} levels, mean {mean:.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", help="folder of photographs, including its subfolders; default: generated images")
    parser.add_argument("--quality", type=int, default=85, help="quality of the JPEG files")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=40, help="batch size of the workers")
    args = parser.parse_args()
    torch.set_num_threads(1)
    photographs = find_photographs(args.images)
    batch = torch.randint(0, 256, (64, 3, SIZE, SIZE), dtype=torch.uint8)
    preprocessing = preprocessing_of(ViTConfig(image_size=SIZE, patch_size=8, width=8, layers=1, heads=1))
    device_ms = cpu_ms(lambda _: normalize(batch, preprocessing.mean, preprocessing.std), 20) / 64
    print(f"normalization, which clip_exp does on the device: {device_ms:.3f} ms per image on one core of this CPU")
    with tempfile.TemporaryDirectory() as folder:
        for name, (side, count, _) in SETS.items():
            report(name, make_photographs(Path(folder) / str(side), side, count, photographs, args.quality), args)
        if photographs:
            report(ORIGINAL, write_table(Path(folder), [path.resolve() for path in photographs[:200]]), args)


if __name__ == "__main__":
    main()
