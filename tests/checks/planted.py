"""Small data set with a known number of each fault."""

import csv
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

CAPTIONS = (
    "a dog on the beach",
    "two children in the snow",
    "a red bicycle",
    "an old house with a garden",
    "a bowl of fruit",
)
CHINESE = ("一只狗嘴里叼着球在海滩上奔跑", "两个穿红色夹克的孩子在雪地里玩耍", "桌子上放着一碗新鲜的水果")
ARABIC = ("كلب يركض على الشاطئ وفي فمه كرة", "طفلان يرتديان سترات حمراء يلعبان في الثلج")
DEVANAGARI = ("एक कुत्ता समुद्र तट पर दौड़ रहा है", "मेज पर ताजे फलों का एक कटोरा")
LONG = "a very long description of " + "a house and a garden and " * 30
GOOD = 20


class Planted(NamedTuple):
    train: Path
    val: Path


def plant(root: Path) -> Planted:
    """Write `data/train.csv`, `data/val.csv` and their images to `root`."""
    folder = root / "data"
    folder.mkdir(parents=True)
    good = [_noise(folder / f"good/{number:02}.jpg", number, (320 + 8 * number, 240)) for number in range(GOOD)]
    rows = [(path, f"{CAPTIONS[number % 5]}, number {number}") for number, path in enumerate(good)]
    rows += [(path, "a photo") for path in good[:6]]
    rows += [(good[0], "a photo")] * 2  # repeated pairs
    rows += [(path, caption) for path, caption in zip(good, (*CHINESE, *ARABIC, *DEVANAGARI), strict=False)]
    rows += [(good[7], LONG), (good[8], LONG.replace("house", "horse")), (good[9], ""), (good[10], "  ")]
    rows += [(path, f"bad {number}") for number, path in enumerate(_bad_images(root, folder))]
    rows += [(path, f"odd {number}") for number, path in enumerate(_odd_images(folder))]
    for number in range(2):
        shutil.copy(folder / good[0], folder / f"copy{number}.jpg")
        rows.append((f"copy{number}.jpg", f"copied {number}"))
    train = _write(folder / "train.csv", rows)
    with open(train, "a", encoding="utf-8") as file:
        file.write("good/01.jpg\n" + "good/01.jpg,too,many\n" * 2 + "good/02.jpg,with a \0 in it\n")
    return Planted(train, _write(folder / "val.csv", _leaking(folder, good)))


def _leaking(folder: Path, good: list[str]) -> list[tuple[str, str]]:
    """Return eight good rows, two copies of training images (one with its caption), one training image itself, and a narrow strip."""
    rows = [
        (_noise(folder / f"val/{number}.jpg", 100 + number, (300, 300)), f"held out {number}") for number in range(8)
    ]
    for number in (2, 3):
        shutil.copy(folder / good[number], folder / f"val/leak{number}.jpg")
    rows += [("val/leak2.jpg", f"{CAPTIONS[2]}, number 2"), ("val/leak3.jpg", "another caption")]
    rows += [(_noise(folder / "val/strip.png", 120, (3000, 2)), "a strip")]  # which could be trained on
    return [*rows, (good[4], "a third caption")]


def _bad_images(root: Path, folder: Path) -> list[str]:
    (folder / "bad").mkdir()
    whole = (folder / "good/00.jpg").read_bytes()
    (folder / "bad/truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "bad/page.jpg").write_text("<!doctype html><title>404</title>")
    (folder / "bad/empty.jpg").write_bytes(b"")
    Image.new("1", (7000, 7000)).save(folder / "bad/huge.png")
    _noise(root / "outside.jpg", 50, (300, 300))
    names = ["missing1.jpg", "missing2.jpg", "truncated.jpg", "page.jpg", "empty.jpg", "huge.png"]
    return [*(f"bad/{name}" for name in names), "../outside.jpg"]


def _odd_images(folder: Path) -> list[str]:
    """Write three tiny images, two rotated by EXIF, an animation, a gray image and one with alpha."""
    (folder / "odd").mkdir()
    names = [_noise(folder / f"odd/tiny{number}.png", 60 + number, (16, 12)) for number in range(3)]
    for number in range(2):
        exif = Image.Exif()
        exif[0x0112] = 6
        _image(70 + number, (400, 250)).save(folder / f"odd/turned{number}.jpg", exif=exif)
    frames = [_image(80 + number, (240, 240)) for number in range(3)]
    frames[0].save(folder / "odd/animated.gif", save_all=True, append_images=frames[1:])
    _image(90, (240, 240)).convert("L").save(folder / "odd/gray.png")
    _image(91, (240, 240)).convert("RGBA").save(folder / "odd/alpha.webp")
    return [
        *names,
        *(f"odd/{name}" for name in ("turned0.jpg", "turned1.jpg", "animated.gif", "gray.png", "alpha.webp")),
    ]


def _write(path: Path, rows: list[tuple[str, str]]) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([("filepath", "title"), *rows])
    return path


def _image(seed: int, size: tuple[int, int]) -> Image.Image:
    """Return smooth noise, which compresses like a photograph."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def _noise(path: Path, seed: int, size: tuple[int, int]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    _image(seed, size).save(path)
    return str(path.relative_to(path.parents[1]))
