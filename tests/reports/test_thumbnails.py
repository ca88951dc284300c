"""Small copies of pictures for pages."""

import base64
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clip_exp.data.pictures import PictureFiles
from clip_exp.reports.thumbnails import SIDE, Thumbnails
from tests.small_runs import write_picture


def opened(uri: str | None) -> Image.Image:
    assert uri is not None
    head, _, data = uri.partition(",")
    assert head == "data:image/jpeg;base64"
    return Image.open(BytesIO(base64.b64decode(data)))


def test_a_thumbnail_keeps_the_pixels_but_neither_place_nor_comment_nor_turn(tmp_path: Path):
    picture = Image.new("RGB", (400, 100), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turned
    exif[0x010E] = "at home"
    picture.save(tmp_path / "a.jpg", exif=exif, comment=b"secret", icc_profile=b"profile")
    thumbnail = Thumbnails(PictureFiles([tmp_path / "a.jpg"]))[0]
    small = opened(thumbnail.uri)
    assert small.size == (thumbnail.width, thumbnail.height) == (SIDE, SIDE // 4)
    assert not small.getexif()
    assert not {"comment", "icc_profile", "exif"} & small.info.keys()
    assert np.abs(np.array(small).astype(int) - [255, 0, 0]).max() < 8


def test_small_pictures_are_not_enlarged(tmp_path: Path):
    thumbnail = Thumbnails(PictureFiles([write_picture(tmp_path / "a.png", 0, (28, 20))]))[0]
    assert opened(thumbnail.uri).size == (28, 20)
    assert thumbnail.small


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "I;16", "CMYK"])
def test_every_mode_becomes_a_thumbnail(tmp_path: Path, mode: str):
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    Image.new(mode, (30, 20)).save(path)
    assert opened(Thumbnails(PictureFiles([path]))[0].uri).mode == "RGB"


def test_a_picture_that_is_gone_says_why(tmp_path: Path):
    path = tmp_path / "gone.png"
    (tmp_path / "broken.png").write_bytes(b"no picture")
    gone, broken = (Thumbnails(PictureFiles([path, tmp_path / "broken.png"]))[number] for number in (0, 1))
    assert (gone.uri, gone.reason, gone.name) == (None, "no such file", "gone.png")
    assert broken.uri is None
    assert "not a picture" in broken.reason
