"""Check of the directories of a TIFF before Pillow reads them. Does not import torch."""

import struct
from collections.abc import Iterator

# Values of a tag, which Pillow converts to a tuple of Python objects: a tag of 60 MB would become some GB. An image has an
# offset for each strip or tile, at most one per row and color or a few for 1,000 pixels.
MAX_VALUES = 1 << 18
MAX_TAGS = 1 << 12  # of a directory; published TIFFs have some dozens
_BYTES = (1, 2, 7)  # types whose values remain bytes: BYTE, ASCII, UNDEFINED
_DIRECTORIES = (0x8769, 0x8825, 0xA005)  # tags that point to directories that Pillow reads, too: EXIF, GPS, Interop


def is_tiff(data: bytearray) -> bool:
    """Return True for the start of a TIFF or BigTIFF."""
    return data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def problem(data: bytearray) -> str | None:
    """Return what is wrong with the directories of a TIFF's first image; None: nothing, or Pillow will report it."""
    order, is_big = ("<" if data[:2] == b"II" else ">"), b"+" in data[2:4]
    try:
        (first,) = struct.unpack_from(f"{order}Q" if is_big else f"{order}L", data, 8 if is_big else 4)
        return next(_problems(data, first, order, is_big), None)
    except struct.error:  # a directory behind the end of the file
        return None


def _problems(data: bytearray, start: int, order: str, is_big: bool, depth: int = 0) -> Iterator[str]:
    number, entry, offset = (f"{order}Q", f"{order}HHQ", f"{order}Q") if is_big else (f"{order}H", f"{order}HHL", f"{order}L")
    (tags,) = struct.unpack_from(number, data, start)
    if tags > MAX_TAGS:
        yield f"a directory of {tags:,} tags"
        return
    start += struct.calcsize(number)
    step = struct.calcsize(entry) + struct.calcsize(offset)
    for position in range(start, start + tags * step, step):
        tag, kind, count = struct.unpack_from(entry, data, position)
        if kind not in _BYTES and count > MAX_VALUES:
            yield f"a tag of {count:,} values"
        if tag in _DIRECTORIES and depth < len(_DIRECTORIES):
            (inner,) = struct.unpack_from(offset, data, position + step - struct.calcsize(offset))
            yield from _problems(data, inner, order, is_big, depth + 1)
