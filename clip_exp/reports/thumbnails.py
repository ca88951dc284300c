"""Small copies of pictures that stand inside a page."""

import base64
from dataclasses import dataclass
from io import BytesIO

from PIL import Image

from clip_exp.data.files import BadImage
from clip_exp.data.pictures import Pictures

SIDE = 200  # pixels of the longest side
QUALITY = 82
SMALL = 64  # pixels; a picture with shorter sides is shown enlarged, and its pixels as squares
NO_LIMIT = 2**62  # of pixels: a picture that was scored has passed the evaluation's own limit


@dataclass(frozen=True)
class Thumbnail:
    """A picture for a page. Where it cannot be read any more, `uri` is None and `reason` says why."""

    uri: str | None  # data:image/jpeg;base64,…
    width: int
    height: int
    path: str
    reason: str = ""

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.replace("\\", "/").rstrip("/").rpartition("/")[2]

    @property
    def small(self) -> bool:
        return max(self.width, self.height) < SMALL


class Thumbnails:
    """Thumbnails of a set, each made once: what the model saw (EXIF ignored, RGB), before its crop; nothing of the file but pixels."""

    def __init__(self, pictures: Pictures) -> None:
        self._pictures = pictures
        self._made: dict[int, Thumbnail] = {}

    def __getitem__(self, index: int) -> Thumbnail:
        if index not in self._made:
            self._made[index] = self._make(index)
        return self._made[index]

    def _make(self, index: int) -> Thumbnail:
        path = self._pictures.name(index)
        try:
            picture = self._pictures.open(index, NO_LIMIT).convert("RGB")
        except BadImage as error:
            return Thumbnail(None, SIDE, SIDE, path, str(error))
        return shrunk(picture, path)


def shrunk(picture: Image.Image, path: str) -> Thumbnail:
    """A thumbnail of an RGB picture, which is made small in place."""
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    bare = Image.new("RGB", picture.size)
    bare.paste(picture)
    buffer = BytesIO()
    bare.save(buffer, "JPEG", quality=QUALITY, optimize=True)
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return Thumbnail(f"data:image/jpeg;base64,{encoded}", *picture.size, path)
