"""Pictures for the page: some good ones with their captions, and some that there are more than once."""

import numpy as np
from PIL import Image

from clip_exp.checks.describe import Equalities
from clip_exp.checks.duplicates import equal_groups
from clip_exp.checks.scanned import Scanned
from clip_exp.checks.splits import TRAIN, VAL, Split
from clip_exp.data.files import BadImage, ImageLimits
from clip_exp.data.images import decode_rgb
from clip_exp.reports.data_page import Equal, Gallery, ImageExample
from clip_exp.reports.page import SIDE, Thumbnail, shrunk

PICTURES = {TRAIN: 12, VAL: 8}
CAPTIONS = 5  # of a picture
EQUAL = 8  # pictures that there are more than once
PATHS = 6  # of such a picture


def collect(scanned: list[Scanned], equal: Equalities, limits: ImageLimits) -> Gallery:
    """What the page shows; the same each time for the same data."""
    samples = {each.split.name: _samples(each, limits) for each in scanned}
    copies: list[Equal] = []
    for each, contents in zip(scanned, equal.contents, strict=True):
        for group in equal_groups(contents)[:EQUAL]:
            rows = each.split.first_rows[group].tolist()
            paths = [(each.split.name, each.split.path(row)) for row in rows]
            copies.append(Equal(_thumbnail(each.split, rows[0], limits), paths[:PATHS]))
    return Gallery(samples, copies, _leaks(scanned, equal, limits))


def _samples(scanned: Scanned, limits: ImageLimits) -> list[ImageExample]:
    """Random good pictures."""
    split, pictures = scanned.split, scanned.good["picture"]
    count = min(len(pictures), PICTURES[split.name])
    samples = []
    for picture in np.sort(np.random.default_rng(0).choice(pictures, count, replace=False)).tolist():
        rows = np.flatnonzero(split.picture_of_row == picture)
        captions = [split.caption(row) for row in rows[:CAPTIONS].tolist()]
        samples.append(ImageExample(_thumbnail(split, int(rows[0]), limits), captions, len(rows) - len(captions)))
    return samples


def _leaks(scanned: list[Scanned], equal: Equalities, limits: ImageLimits) -> list[Equal]:
    if equal.leakage is None:
        return []
    train, val = (each.split for each in scanned)
    of_val = {leak.val_picture: leak for leak in (*equal.leakage.same_path, *equal.leakage.same_bytes)}
    shown = []
    for leak in [of_val[picture] for picture in sorted(of_val)[:EQUAL]]:
        row, train_row = int(val.first_rows[leak.val_picture]), int(train.first_rows[leak.train_picture])
        shown.append(Equal(_thumbnail(val, row, limits), [(VAL, val.path(row)), (TRAIN, train.path(train_row))]))
    return shown


def _thumbnail(split: Split, row: int, limits: ImageLimits) -> Thumbnail:
    """What training sees of a picture, before its crop."""
    path = split.path(row)
    try:
        image = decode_rgb(split.read_picture(row, limits), limits)
    except BadImage as error:
        return Thumbnail(None, SIDE, SIDE, path, str(error))
    return shrunk(Image.fromarray(image.permute(1, 2, 0).numpy()), path)
