"""Check of the directories of a TIFF before Pillow reads them. Does not import torch."""

import struct

# Values of a tag, which Pillow converts to a tuple of Python objects: a tag of 60 MB would become some GB. An image has an
# offset for each strip or tile, at most one per row and color or a few for 1,000 pixels.
MAX_VALUES = 1 << 18
MAX_TAGS = 1 << 12  # of a directory; published TIFFs have some dozens
_BYTES = (1, 2, 7)  # types whose values remain bytes: BYTE, ASCII, UNDEFINED
_DIRECTORIES = (0x8769, 0x8825, 0xA005)  # tags that point to directories that Pillow reads, too: EXIF, GPS, Interop
_OFFSETS = {3: "H", 4: "L", 13: "L", 16: "Q"}  # types of such a pointer: SHORT, LONG, IFD, LONG8


def is_tiff(data: bytearray) -> bool:
    """Return True for the start of a TIFF or BigTIFF."""
    return data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def problem(data: bytearray) -> str | None:
    """Return what is wrong with the directories of a TIFF's first image; None: nothing, or Pillow will report it."""
    order, is_big = "<" if data[:2] == b"II" else ">", b"+" in data[2:4]
    first = int.from_bytes(data[8:16] if is_big else data[4:8], "little" if order == "<" else "big")
    directories = [first]
    for start in directories:  # grows while it is read
        try:
            if found := _problem_in(data, start, order, is_big, directories):
                return found
        except struct.error:  # a directory behind the end of the file
            continue
    return None


def _problem_in(data: bytearray, start: int, order: str, is_big: bool, directories: list[int]) -> str | None:
    """Return what is wrong with a directory, and add those that it points to."""
    number, entry = (
        (order + "Q", struct.Struct(order + "HHQ8s")) if is_big else (order + "H", struct.Struct(order + "HHL4s"))
    )
    (tags,) = struct.unpack_from(number, data, start)
    if tags > MAX_TAGS:
        return f"a directory of {tags:,} tags"
    start += struct.calcsize(number)
    for position in range(start, start + tags * entry.size, entry.size):
        tag, kind, count, value = entry.unpack_from(data, position)
        if kind not in _BYTES and count > MAX_VALUES:
            return f"a tag of {count:,} values"
        if tag in _DIRECTORIES:
            if kind not in _OFFSETS:
                return f"an EXIF directory at a place of type {kind}"
            (place,) = struct.unpack_from(order + _OFFSETS[kind], value)
            if place not in directories:
                directories.append(place)
        if len(directories) > 1 + len(_DIRECTORIES):
            return "several EXIF directories"
    return None
