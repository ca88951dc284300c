"""Labelled pictures to classify: a folder per class, ImageNet's layout, or a table with a label column. No torch."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clip_exp.config.schema import OnBadRow
from clip_exp.data.pictures import PictureFiles, Pictures
from clip_exp.data.tables import read_table
from clip_exp.errors import ConfigError, DataError
from clip_exp.evaluation.prompts import imagenet_classes, read_lines

IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"))
WNID = re.compile(r"n\d{8}$")
ACCEPTED_CLASSES = (
    "labels, imagenet, a list, a mapping of label to name, or a file with one name (or label<tab>name) per line"
)


@dataclass(frozen=True)
class LabeledImages:
    """Pictures and the class that each belongs to."""

    pictures: Pictures
    labels: Sequence[int]  # positions in `class_names`
    class_names: list[str]  # what pictures are scored against
    where: str  # for people: the folder or table
    keys: list[str | None] = field(default_factory=list)  # folder or label of each class; None: the data lacks it
    unlabeled: int = 0  # pictures of the table that have no label, and are left out
    imagenet: list[list[int]] | None = (
        None  # of each class the classes of ImageNet-1k that it stands for, where it does
    )

    @property
    def missing(self) -> list[str]:
        """Names that pictures are scored against though none belongs to them."""
        present = set(self.labels)
        return [name for position, name in enumerate(self.class_names) if position not in present]


def from_folder(root: str | Path, classes: Any = "labels", where: str = "root") -> LabeledImages:
    """`<root>/<class>/…/<picture>`: a class per folder, in the order of the folders' names (code points).

    Hidden files and files that are no pictures are left out. Under `labels` a name is its folder's with `_` as a space.

    Raises:
        ConfigError: no such folder; `classes` does not fit the folders.
        DataError: no class folders, no pictures, or under `imagenet` a folder that is no class of ImageNet-1k.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise ConfigError(f"{where}={root}: no such folder. Give a folder that holds one folder of pictures per class.")
    folders = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    files = {folder: _pictures(root / folder) for folder in folders}
    if not any(files.values()):
        loose = (
            " There are pictures in the folder itself: sort them into one folder per class." if _pictures(root) else ""
        )
        raise DataError(f"{where}={root} holds no folder with pictures.{loose}")
    position, names = _match(folders, [folder.replace("_", " ") for folder in folders], classes, str(root))
    paths = [path for folder in folders for path in files[folder]]
    labels = [position[folder] for folder in folders for _ in files[folder]]
    return LabeledImages(PictureFiles(paths), labels, names, str(root), _keys(position, names))


def from_table(
    table: Any,
    *,
    image_key: str,
    label_key: str,
    image_root: str | None = None,
    separator: str = "auto",
    encoding: str = "auto",
    on_bad_row: OnBadRow = OnBadRow.error,
    classes: Any = "labels",
) -> LabeledImages:
    """Pictures of a table, labelled by a column; the classes are its distinct values in the order of code points.

    A picture in several rows, as with several captions, counts once; one without a label is left out, as in validation.

    Raises:
        ConfigError: no such file; `classes` does not fit the labels.
        DataError: a column is missing, a row is bad, a label contradicts another, or there are none.
    """
    pairs = read_table(
        table,
        image_key=image_key,
        caption_key=None,
        label_key=label_key,
        image_root=image_root,
        separator=separator,
        encoding=encoding,
        on_bad_row=on_bad_row,
    )
    assert pairs.labels is not None
    written = pairs.labels.to_pylist()
    first_row: dict[int, int] = {}
    for row, picture in enumerate(pairs.image_index().tolist()):
        first = first_row.setdefault(picture, row)
        if written[row] != written[first]:
            raise DataError(
                f"{pairs.where(row)}: {pairs.path(row)} is '{written[row]}' here and '{written[first]}' before; give one label."
            )
    rows = [row for row in first_row.values() if written[row]]
    if not rows:
        raise DataError(f"{table}: the column {label_key} is empty in every row.")
    present = sorted({written[row] for row in rows})
    position, names = _match(present, present, classes, str(table))
    labels = [position[written[row]] for row in rows]
    paths, unlabeled = [pairs.image_path(row) for row in rows], len(first_row) - len(rows)
    return LabeledImages(PictureFiles(paths), labels, names, str(table), _keys(position, names), unlabeled)


def _match(keys: list[str], own_names: list[str], classes: Any, where: str) -> tuple[dict[str, int], list[str]]:
    """The position of each folder or label among the names to score against, and those names.

    Names are matched to `keys` by a mapping where `classes` is one, by name where every key is among the names, and by
    order where there are as many names as keys.
    """
    if classes == "labels":
        return {key: position for position, key in enumerate(keys)}, own_names
    if classes == "imagenet":
        return _match_imagenet(keys, where)
    if isinstance(classes, dict):
        return _match_mapping(keys, {str(key): str(name) for key, name in classes.items()}, where)
    lines = read_lines(classes, "classes", ACCEPTED_CLASSES)
    if all("\t" in line for line in lines):
        return _match_mapping(keys, dict(line.split("\t", 1) for line in lines), where)
    by_name = {name: position for position, name in reversed(list(enumerate(lines)))}
    if all(key in by_name or name in by_name for key, name in zip(keys, own_names, strict=True)):
        if len(by_name) < len(lines):
            raise ConfigError(
                "classes has names twice, so labels cannot be matched by name: give a mapping of label to name."
            )
        pairs = zip(keys, own_names, strict=True)
        return {key: by_name[key if key in by_name else name] for key, name in pairs}, lines
    if len(lines) != len(keys):
        raise ConfigError(
            f"classes has {len(lines)} names, {where} has {len(keys)} classes, and not all of these are among those. "
            f"Give a name for each in sorted order ({', '.join(keys[:3])}, …), or a mapping of label to name."
        )
    return {key: position for position, key in enumerate(keys)}, lines


def _match_mapping(keys: list[str], mapping: dict[str, str], where: str) -> tuple[dict[str, int], list[str]]:
    unknown = [key for key in keys if key not in mapping]
    if unknown:
        raise ConfigError(f"classes names nothing for {_listing(unknown)} of {where}.")
    return {key: position for position, key in enumerate(mapping)}, list(mapping.values())


def _match_imagenet(keys: list[str], where: str) -> tuple[dict[str, int], list[str]]:
    position = {wnid: index for index, (wnid, _) in enumerate(imagenet_classes())}
    unknown = [key for key in keys if key not in position]
    if unknown:
        what = "no class of ImageNet-1k" if WNID.match(unknown[0]) else "no WordNet id such as n01440764"
        raise DataError(
            f"{where}: {_listing(unknown)} is {what}. Move it away, or score against its own names: classes=labels."
        )
    return {key: position[key] for key in keys}, [name for _, name in imagenet_classes()]


def _keys(position: dict[str, int], names: list[str]) -> list[str | None]:
    key_at = {index: key for key, index in position.items()}
    return [key_at.get(index) for index in range(len(names))]


def _pictures(folder: Path) -> list[str]:
    """Picture files below a folder, sorted; links are followed, hidden files and folders are not."""
    found = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            os.path.join(parent, name)
            for name in files
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES
        ]
    return sorted(found)


def _listing(names: list[str], limit: int = 5) -> str:
    return ", ".join(f"'{name}'" for name in names[:limit]) + (
        f" and {len(names) - limit} more" if len(names) > limit else ""
    )
