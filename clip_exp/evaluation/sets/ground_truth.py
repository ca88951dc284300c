"""Images in one folder with a file of labels, as the validation images of ImageNet are distributed. Does not import torch."""

import csv
import io
import os
import re
import tarfile
from pathlib import Path
from typing import Any

from clip_exp.data.image_sets import ImageFiles
from clip_exp.data.tables.columns import BLANKS
from clip_exp.errors import ConfigError, DataError
from clip_exp.evaluation.sets.labeled import IMAGE_SUFFIXES, LabeledImages, find_images, in_order, listing, match

DEVKIT_IDS, DEVKIT_CLASSES = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
DEVKIT_FOLDERS = ("", "data", "ILSVRC2012_devkit_t12/data")  # possible locations of the files in a devkit folder
LARGEST = 64 * 1024 * 1024  # bytes; larger label files and archive members are refused
ACCEPTED = (
    "ImageNet's devkit (its folder or ILSVRC2012_devkit_t12.tar.gz), LOC_val_solution.csv, a file with `image label` per "
    "line, or a file with a wnid or a number from 0 per line"
)

Labels = list[str] | dict[str, str]  # in the order of the image names, or by image name without suffix


def from_flat_folder(root: str | Path, ground_truth: str | Path, classes: Any, where: str) -> LabeledImages:
    """Return the images `<root>/<image>`, labeled by a file.

    Labels without image names are assigned in the order of the image names, in which numbers are ordered by value.

    Args:
        root: folder of the images.
        ground_truth: file of labels; see `read_ground_truth`.
        classes: class names as in `LabeledDataConfig.classes`.
        where: key of the data, for messages.
    """
    root, key = Path(root).expanduser(), f"{where}.ground_truth"
    if not root.is_dir():
        raise ConfigError(f"{where}.root={root}: no such folder. Give the folder of the images.")
    paths = sorted(find_images(root, recursive=False), key=_natural)
    if not paths:
        raise DataError(f"{where}.root={root} contains no images directly. One folder per class needs no ground_truth.")
    labels = read_ground_truth(ground_truth, key)
    if len(labels) != len(paths):
        raise DataError(
            f"{key}={ground_truth} has {len(labels):,} labels, {root} has {len(paths):,} images: the numbers must be equal."
        )
    if isinstance(labels, dict):
        names = [_stem(path) for path in paths]
        if unknown := [name for name in names if name not in labels]:
            raise DataError(f"{key}={ground_truth} has no label for {listing(unknown)} of {root}.")
        labels = [labels[name] for name in names]
    present = in_order(labels)
    matched = match(present, present, classes, str(ground_truth), where)
    return LabeledImages(
        ImageFiles(paths),
        [matched.position[label] for label in labels],
        matched.names,
        str(root),
        matched.keys,
        imagenet=matched.imagenet,
        about={"ground_truth": str(Path(ground_truth).expanduser().resolve())},
    )


def read_ground_truth(path: str | Path, key: str) -> Labels:
    """Return the labels of flat images.

    Args:
        path: ImageNet's devkit as a folder or archive, whose ids 1 to 1000 are mapped to wnids by its `meta.mat`; Kaggle's
            LOC_val_solution.csv; text with `image label` per line, as Caffe's val.txt; or text with a label per line.
            Labels are wnids, or their positions in the sorted list of wnids, from 0.
        key: configuration key, for messages.
    """
    file, where = Path(path).expanduser(), f"{key}={path}"
    if file.is_dir() or (file.name == DEVKIT_IDS and (file.parent / DEVKIT_CLASSES).is_file()):
        folder = file if file.is_dir() else file.parent
        for below in DEVKIT_FOLDERS:
            ids, classes = folder / below / DEVKIT_IDS, folder / below / DEVKIT_CLASSES
            if ids.is_file() and classes.is_file():
                return _from_devkit(ids.read_bytes(), classes.read_bytes(), where)
        raise ConfigError(f"{where} contains no data/{DEVKIT_IDS} with data/{DEVKIT_CLASSES}: use {ACCEPTED}.")
    if not file.is_file():
        raise ConfigError(f"{where}: no such file. Use {ACCEPTED}.")
    if file.name == DEVKIT_IDS:
        raise ConfigError(f"{where}: its ids are mapped to classes by {DEVKIT_CLASSES}: use the whole devkit.")
    if tarfile.is_tarfile(file):
        return _from_devkit(*_devkit_archive(file, where), where)
    if file.stat().st_size > LARGEST:
        raise ConfigError(f"{where} is too large for a file of labels. Use {ACCEPTED}.")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where} is not text. Use {ACCEPTED}.") from error
    lines = [stripped for line in text.split("\n") if (stripped := line.strip(BLANKS))]
    if not lines:
        raise DataError(f"{where} is empty. Use {ACCEPTED}.")
    if [field.strip().lower() for field in lines[0].split(",")] == ["imageid", "predictionstring"]:
        pairs = [[row[0], (row[1].split() or [""])[0]] for row in csv.reader(lines[1:]) if len(row) == 2]
    else:
        pairs = [line.rsplit(None, 1) for line in lines]
        if not all(len(pair) == 2 and Path(pair[0]).suffix.lower() in IMAGE_SUFFIXES for pair in pairs):
            return lines
    labels: dict[str, str] = {}
    for image, label in pairs:
        name = _stem(image)
        if not label:
            raise DataError(f"{where} has no label for {image}.")
        if labels.setdefault(name, label) != label:
            raise DataError(f"{where} has two labels for {image}: {labels[name]} and {label}.")
    return labels


def _devkit_archive(file: Path, where: str) -> tuple[bytes, bytes]:
    """Return the contents of the two required files of a devkit archive, which is not extracted."""
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(file) as archive:
            for member in archive:
                name = os.path.basename(member.name)
                if name in (DEVKIT_IDS, DEVKIT_CLASSES) and member.isreg() and member.size <= LARGEST:
                    content = archive.extractfile(member)
                    assert content is not None
                    found[name] = content.read()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"{where} cannot be read: {error}. Download it again.") from error
    if len(found) < 2:
        raise ConfigError(f"{where} contains no {DEVKIT_IDS} with {DEVKIT_CLASSES}: use {ACCEPTED}.")
    return found[DEVKIT_IDS], found[DEVKIT_CLASSES]


def _from_devkit(ids: bytes, classes: bytes, where: str) -> list[str]:
    """Return the wnids of a list of ids. Only synsets without children are classes; the others are groups of them."""
    from scipy.io import loadmat  # 0.2 s to import

    try:
        synsets = loadmat(io.BytesIO(classes), squeeze_me=True)["synsets"]
        columns = (synsets["ILSVRC2012_ID"], synsets["WNID"], synsets["num_children"])
        wnid = {str(int(number)): str(name) for number, name, children in zip(*columns, strict=True) if children == 0}
    except Exception as error:  # scipy raises various errors for damaged files
        raise DataError(
            f"{where}: its {DEVKIT_CLASSES} cannot be read ({error}). Download the devkit again."
        ) from error
    lines = ids.decode("ascii", errors="replace").split()
    if unknown := [line for line in lines if line not in wnid]:
        raise DataError(f"{where}: {DEVKIT_IDS} has {listing(unknown)}, which {DEVKIT_CLASSES} does not contain.")
    return [wnid[line] for line in lines]


def _stem(path: str) -> str:
    return os.path.splitext(os.path.basename(path))[0]


def _natural(path: str) -> list[tuple[int, str]]:
    """Return a sort key that places `2.png` before `10.png`."""
    parts = re.split(r"(\d+)", os.path.basename(path))
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]
