"""Thousands of unusual and damaged images from a seed, which a loader must survive.

Each kind of damage is a function, and `damaged_images` uses all of them in turn.
"""

import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from clip_exp.data import files
from tests.data.encoded import (
    COMPRESSIONS,
    ORIENTATION,
    SUFFIXES,
    Draw,
    any_format,
    bomb,
    chunk,
    encoded,
    image,
    png,
    tiff,
    tiff_end,
    with_size,
)

Maker = Callable[[Path, Draw], str | None]


class Made(NamedTuple):
    """File of the corpus. It may not exist."""

    name: str
    way: str  # the function that made it
    expected: str | None  # good; or bad, by the kind of its reason; None: not known


def damaged_images(folder: Path, count: int, seed: int) -> list[Made]:
    """Write `count` files of a few kB to `folder`, which is their data root; some are links to files next to it."""
    folder.mkdir(parents=True, exist_ok=True)
    outside = folder.parent / f"outside-{folder.name}.jpg"
    outside.write_bytes(encoded(image(np.random.default_rng(0)), "JPEG"))
    draw = np.random.default_rng(seed)
    made = []
    for i in range(count):
        maker = MAKERS[i % len(MAKERS)]
        name = f"{i:05d}.{draw.choice(list(SUFFIXES.values()))}"
        made.append(Made(name, maker.__name__, maker(folder / name, draw)))
    return made


# ---------------------------------------------------------------------------------------------------- odd but good


def plain(file: Path, draw: Draw) -> str | None:
    file.write_bytes(any_format(draw))  # mostly not what its suffix says
    return "good"


def odd_mode(file: Path, draw: Draw) -> str | None:
    mode = str(draw.choice(["1", "L", "LA", "P", "RGBA", "I;16"]))
    drawn = image(draw, "L" if mode == "I;16" else mode)
    if mode == "I;16":
        drawn = Image.fromarray(np.asarray(drawn).astype(np.uint16) * 257)
    file.write_bytes(encoded(drawn, "PNG"))
    return "good"


def cmyk(file: Path, draw: Draw) -> str | None:
    file.write_bytes(encoded(image(draw, "CMYK"), "JPEG", progressive=bool(draw.integers(2))))
    return "good"


def tiff_of_any_kind(file: Path, draw: Draw) -> str | None:
    mode = str(draw.choice(["1", "L", "LA", "P", "RGBA", "CMYK", "LAB", "F", "I"]))
    compression = COMPRESSIONS[draw.integers(3)]
    file.write_bytes(encoded(image(draw).convert(mode), "TIFF", compression=compression))
    return "good"


def palette_with_alpha(file: Path, draw: Draw) -> str | None:
    drawn = image(draw).quantize(16)
    file.write_bytes(encoded(drawn, "PNG", transparency=draw.bytes(16)))
    return "good"


def animated(file: Path, draw: Draw) -> str | None:
    frames = [image(draw).resize((20, 20)) for _ in range(4)]
    kind = str(draw.choice(["GIF", "WEBP", "PNG", "TIFF", "AVIF", "HEIF"]))
    file.write_bytes(encoded(frames[0], kind, save_all=True, append_images=frames[1:]))
    return "good"


def two_in_one(file: Path, draw: Draw) -> str | None:
    file.write_bytes(encoded(image(draw), "MPO", save_all=True, append_images=[image(draw)]))
    return "good"


def turned(file: Path, draw: Draw) -> str | None:
    drawn = image(draw)
    exif = drawn.getexif()
    exif[ORIENTATION] = int(draw.integers(0, 12))
    kind = str(draw.choice(["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "HEIF"]))
    file.write_bytes(encoded(drawn, kind, exif=exif))
    return "good"


def garbage_in_exif(file: Path, draw: Draw) -> str | None:
    kind = str(draw.choice(["JPEG", "PNG", "WEBP"]))
    file.write_bytes(encoded(image(draw), kind, exif=b"Exif\0\0" + draw.bytes(200)))
    return "good"


def garbage_behind(file: Path, draw: Draw) -> str | None:
    file.write_bytes(encoded(image(draw), str(draw.choice(["JPEG", "PNG"]))) + draw.bytes(300))
    return "good"


def tiny_or_long(file: Path, draw: Draw) -> str | None:
    sizes = [(1, 1), (1, 3000), (3000, 1), (2, 1)]
    drawn = image(draw).resize(sizes[draw.integers(len(sizes))])
    file.write_bytes(encoded(drawn, str(draw.choice(list(SUFFIXES)))))
    return "good"


def link_inside(file: Path, draw: Draw) -> str | None:
    target = file.with_suffix(".target")
    target.write_bytes(any_format(draw))
    file.symlink_to(target.name)
    return "good"


# ------------------------------------------------------------------------------------------------------- no images


def missing(file: Path, draw: Draw) -> str | None:
    return files.NO_SUCH_FILE


def dangling_link(file: Path, draw: Draw) -> str | None:
    file.symlink_to("nothing")
    return files.NO_SUCH_FILE


def link_outside(file: Path, draw: Draw) -> str | None:
    file.symlink_to(file.parent.parent / f"outside-{file.parent.name}.jpg")
    return "good"


def link_to_itself(file: Path, draw: Draw) -> str | None:
    file.symlink_to(file.name)
    return files.CANNOT_OPEN


def device(file: Path, draw: Draw) -> str | None:
    file.symlink_to("/dev/zero")
    return files.NOT_A_FILE


def pipe(file: Path, draw: Draw) -> str | None:
    os.mkfifo(file)
    return files.NOT_A_FILE


def folder(file: Path, draw: Draw) -> str | None:
    file.mkdir()
    return files.NOT_A_FILE


def empty(file: Path, draw: Draw) -> str | None:
    file.touch()
    return files.EMPTY_FILE


def too_large(file: Path, draw: Draw) -> str | None:
    file.touch()
    os.truncate(file, (1 << 30) + int(draw.integers(1 << 30)))  # holes take no room
    return files.TOO_MANY_BYTES


def html(file: Path, draw: Draw) -> str | None:
    file.write_text(f"<!DOCTYPE html><html><body>{draw.integers(1000)}: Not Found</body></html>")
    return files.NOT_AN_IMAGE


def zeros(file: Path, draw: Draw) -> str | None:
    file.write_bytes(bytes(int(draw.integers(1, 4000))))
    return files.NOT_AN_IMAGE


def noise(file: Path, draw: Draw) -> str | None:
    file.write_bytes(draw.bytes(int(draw.integers(1, 4000))))
    return None  # may look like one of Pillow's many formats


def other_format(file: Path, draw: Draw) -> str | None:
    file.write_bytes(encoded(image(draw), str(draw.choice(["SGI", "ICO", "PPM", "PCX"]))))
    return files.NOT_ALLOWED


# -------------------------------------------------------------------------------------------------- damaged images


def cut(file: Path, draw: Draw) -> str | None:
    kind = str(draw.choice(["JPEG", "PNG"]))
    data = encoded(image(draw), kind)
    file.write_bytes(data[: int(draw.integers(len(data) // 2, len(data)))])
    return None if kind == "JPEG" else files.TRUNCATED  # half a small JPEG may be all header


def cut_anywhere(file: Path, draw: Draw) -> str | None:
    data = any_format(draw)
    file.write_bytes(data[: int(draw.integers(1, len(data)))])
    return None  # a GIF without its last byte is whole


def filled_with_zeros(file: Path, draw: Draw) -> str | None:
    """Replace the end by zeros, as an interrupted download into a preallocated file does."""
    data = encoded(image(draw), "JPEG")
    kept = int(draw.integers(len(data) - 8, len(data) - 2))
    file.write_bytes(data[:kept].ljust(len(data), b"\0"))
    return files.TRUNCATED


def hole(file: Path, draw: Draw) -> str | None:
    data = bytearray(any_format(draw))
    start = int(draw.integers(len(data)))
    data[start : start + 40] = bytes(len(data[start : start + 40]))
    file.write_bytes(data)
    return None


def flipped_bits(file: Path, draw: Draw) -> str | None:
    data = bytearray(any_format(draw))
    for position in draw.integers(0, len(data), int(draw.integers(1, 30))):
        data[position] ^= 1 << int(draw.integers(8))
    file.write_bytes(data)
    return None


def flipped_header(file: Path, draw: Draw) -> str | None:
    data = bytearray(any_format(draw))
    for position in draw.integers(0, min(len(data), 64), 3):
        data[position] = int(draw.integers(256))
    file.write_bytes(data)
    return None


def checksum_wrong(file: Path, draw: Draw) -> str | None:
    data = bytearray(encoded(image(draw), "PNG"))
    data[29 + int(draw.integers(4))] ^= 0xFF  # of the header
    file.write_bytes(data)
    return files.DAMAGED


def huge_png(file: Path, draw: Draw) -> str | None:
    side = int(draw.integers(6_400, 2**31))
    file.write_bytes(png(side, side, zlib.compress(bytes(1000))))
    return files.TOO_MANY_PIXELS


def huge_jpeg(file: Path, draw: Draw) -> str | None:
    data = bytearray(encoded(image(draw), "JPEG"))
    size = data.index(b"\xff\xc0") + 5
    data[size : size + 4] = struct.pack(">HH", *draw.integers(6_400, 65_500, 2).tolist())
    file.write_bytes(data)
    return files.TOO_MANY_PIXELS


def large_without_pixels(file: Path, draw: Draw) -> str | None:
    file.write_bytes(png(6_000, 6_000, zlib.compress(bytes(1000))))
    return files.TRUNCATED


def huge_tiff(file: Path, draw: Draw) -> str | None:
    width, height = draw.integers(6_400, 10_000, 2).tolist()
    file.write_bytes(tiff([(273, 4, 1, 8), (279, 4, 1, 100)], width=width, height=height))
    return files.TOO_MANY_PIXELS


def huge_tags(file: Path, draw: Draw) -> str | None:
    values = int(draw.integers(300_000, 500_000))
    strips = [(273, 4, values, tiff_end(2)), (279, 4, values, tiff_end(2))]
    file.write_bytes(tiff(strips, bytes(4 * values)))
    return files.DAMAGED


def one_strip_many_times(file: Path, draw: Draw) -> str | None:
    count = 10_000
    strips = [(273, 4, count, tiff_end(3)), (278, 4, 1, 50), (279, 4, count, tiff_end(3))]
    file.write_bytes(tiff(strips, struct.pack("<L", 8) * count))
    return files.DAMAGED


def other_size_in_the_container(file: Path, draw: Draw) -> str | None:
    kind = str(draw.choice(["AVIF", "HEIF"]))
    file.write_bytes(with_size(encoded(image(draw), kind), *draw.integers(1, 6_000, 2).tolist()))
    return None  # an AVIF is stretched to the stated size


def text_bomb(file: Path, draw: Draw) -> str | None:
    text = chunk(b"zTXt", b"comment\0\0" + bomb())
    file.write_bytes(png(2, 1, zlib.compress(bytes(7)), extra=text))
    return files.DAMAGED


def profile_bomb(file: Path, draw: Draw) -> str | None:
    profile = chunk(b"iCCP", b"profile\0\0" + bomb())
    file.write_bytes(png(2, 1, zlib.compress(bytes(7)), extra=profile))
    return files.DAMAGED


def scans_without_end(file: Path, draw: Draw) -> str | None:
    data = encoded(image(draw), "JPEG", progressive=True)
    scan = data.rindex(b"\xff\xda")
    file.write_bytes(data[:scan] + data[scan:-2] * 200 + data[-2:])
    return files.DAMAGED


MAKERS: tuple[Maker, ...] = (
    plain, odd_mode, tiff_of_any_kind, cmyk, palette_with_alpha, animated, two_in_one, turned, garbage_in_exif, garbage_behind, tiny_or_long,
    link_inside, missing, dangling_link, link_outside, link_to_itself, device, pipe, folder, empty, too_large, html, zeros,
    noise, other_format, cut, cut_anywhere, filled_with_zeros, hole, flipped_bits, flipped_header, checksum_wrong, huge_png,
    huge_jpeg, large_without_pixels, text_bomb, profile_bomb, scans_without_end,
    huge_tiff, huge_tags, one_strip_many_times, other_size_in_the_container,
)  # fmt: skip
