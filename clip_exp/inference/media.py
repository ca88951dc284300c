"""Pictures and videos as a sequence of pictures to encode: a picture is one, a video is a few frames."""

import hashlib
import os
from collections.abc import Sequence

import numpy as np
from PIL import Image

from clip_exp.data.files import Stored, stamp_of
from clip_exp.data.images import open_image
from clip_exp.inference.inputs import FRAMES, Picture, is_video
from clip_exp.inference.video import read_frame


class Media:
    """Pictures (paths or in memory) and videos (paths), laid out as the pictures to encode: `data.pictures.Pictures`.

    Args:
        items: what was given.
        frames: of each video, spread evenly over it.

    Attributes:
        owner: int64 [E], which item each of the E pictures to encode belongs to; ascending.
    """

    def __init__(self, items: Sequence[Picture], frames: int = FRAMES) -> None:
        self.in_memory = [item if isinstance(item, Image.Image) else None for item in items]
        if not any(self.in_memory):
            self.in_memory = []
        self.paths = np.array([_name(position, item) for position, item in enumerate(items)])  # shared by workers
        self.frames = frames
        counts = np.array([frames if is_video(item) else 1 for item in items], dtype=np.int64)
        self.owner = np.repeat(np.arange(len(items)), counts)
        self._first = np.cumsum(counts) - counts

    def __len__(self) -> int:
        return len(self.owner)

    def open(self, index: int, max_pixels: int) -> Image.Image:
        """See `Pictures.open`."""
        item = self.owner[index]
        if self.in_memory and (picture := self.in_memory[item]) is not None:
            return picture
        path = str(self.paths[item])
        if not is_video(path):
            return open_image(path, max_pixels)
        return read_frame(path, index - int(self._first[item]), self.frames, max_pixels)

    def name(self, index: int) -> str:
        """The path of the picture or video."""
        return str(self.paths[self.owner[index]])

    def stored(self, index: int) -> None:
        """See `Pictures.stored`: frames and images in memory have no bytes of their own."""

    def fingerprint(self) -> str:
        """See `Pictures.fingerprint`."""
        digest = hashlib.sha256(f"frames {self.frames}\n".encode())
        for position, path in enumerate(self.paths):
            if self.in_memory and (picture := self.in_memory[position]) is not None:
                digest.update(f"{picture.mode} {picture.size}\n".encode() + picture.tobytes())
            else:
                stamp = stamp_of(Stored(str(path)))
                digest.update(f"{os.path.abspath(path)}\t{stamp}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()


def _name(position: int, item: Picture) -> str:
    return f"picture {position}" if isinstance(item, Image.Image) else str(item)
