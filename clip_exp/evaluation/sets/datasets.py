"""Labeled images of an evaluation: `LabeledImages` from a `LabeledDataConfig`. Does not import torch."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clip_exp.config.evaluation import SOURCES, LabeledDataConfig, TableConfig
from clip_exp.data.generated import generate
from clip_exp.data.image_sets import ImageFiles, TableImages, label_of_images
from clip_exp.data.tables.columns import BLANKS
from clip_exp.data.tables.open import expand, read_table
from clip_exp.data.tables.table import PairTable
from clip_exp.errors import ConfigError, DataError
from clip_exp.evaluation.sets.class_names import CLASS_SETS
from clip_exp.evaluation.sets.ground_truth import from_flat_folder
from clip_exp.evaluation.sets.labeled import LabeledImages, find_images, in_order, listing, match
from clip_exp.evaluation.sets.objectnet import from_objectnet
from clip_exp.evaluation.sets.torchvision_sets import from_torchvision

PARTS = ("train", "val")  # of a generated data set
SPLIT = re.compile(
    r"(test(ing)?|val(id(ation)?)?|dev|eval(uation)?|train(ing)?)([ _-]?(set|split|data|images?|\d+))*", re.IGNORECASE
)

SCORED_FIRST = ("test", "val", "dev", "eval", "train")  # which split to suggest
Parts = tuple[str, ...]  # folders and file name of an image, relative to the root


def labeled_images(
    data: LabeledDataConfig,
    where: str,
    output_dir: str,
    split: str | None = None,
) -> LabeledImages:
    """Return the labeled images of a part of the configuration.

    Args:
        data: part of the configuration.
        where: key of the part, such as `task.flowers`, for messages.
        output_dir: folder for generated data.
        split: split to use if `data.split` is None: "train", or None for the test split.

    Raises:
        ConfigError: there is not exactly one source, a file or folder is missing, or `classes` does not fit the data.
        DataError: the data cannot be used.
    """
    given = [key for key in SOURCES if getattr(data, key) is not None]
    if given != ["root", "torchvision"] and len(given) != 1:
        raise ConfigError(f"{where}: give exactly one of {', '.join(SOURCES)}; given: {', '.join(given) or 'none'}.")
    if data.torchvision is not None:
        return from_torchvision(data, where, split)
    if data.root is not None and data.classes == "objectnet":
        return from_objectnet(data.root, where)
    if data.root is not None and data.ground_truth is not None:
        return from_flat_folder(data.root, data.ground_truth, data.classes, where)
    if data.root is not None:
        return from_folder(data.root, data.classes, where)
    table: Any = data.table
    if data.generate is not None:
        part = data.split or split or "val"
        if part not in PARTS:
            raise ConfigError(f"{where}.split={part} must be one of {', '.join(PARTS)}.")
        table = str(getattr(generate(data.generate, Path(output_dir)), part))
    require_tables(table, where)
    return from_table(table, data, where)


def from_folder(root: str | Path, classes: Any = "labels", where: str = "task") -> LabeledImages:
    """Return the images `<root>/<class>/…/<image>`, with one class per folder.

    Classes are in the order of the folder names: by value if all are numbers, as for ImageNetV2, else by code point. Hidden
    files and files other than images are ignored.

    Args:
        root: folder of the class folders.
        classes: class names as in `LabeledDataConfig.classes`; `labels` uses the folder names with `_` as a space.
        where: key of the data, for messages.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise ConfigError(
            f"{where}.root={root}: no such folder. Give a folder that contains one folder of images per class."
        )
    found = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    folders = in_order(name.strip(BLANKS) for name in found)
    files: dict[str, list[str]] = {folder: [] for folder in folders}
    for name in found:
        files[name.strip(BLANKS)] += find_images(root / name)
    if not isinstance(classes, dict):  # a mapping names the class folders
        require_class_folders(root, files, where)
    if not any(files.values()):
        loose = ""
        if find_images(root, recursive=False):
            published = isinstance(classes, str) and classes in CLASS_SETS
            with_file = f", or name a file of their labels: {where}.ground_truth=FILE" if published else ""
            loose = f" It contains images itself: sort them into one folder per class{with_file}."
        raise DataError(f"{where}.root={root} contains no folders with images.{loose}")
    matched = match(folders, [folder.replace("_", " ") for folder in folders], classes, str(root), where)
    paths = [path for folder in folders for path in files[folder]]
    labels = [matched.position[folder] for folder in folders for _ in files[folder]]
    return LabeledImages(ImageFiles(paths), labels, matched.names, str(root), matched.keys, imagenet=matched.imagenet)


def require_class_folders(root: Path, files: dict[str, list[str]], where: str) -> None:
    """Check that the folders in a root are classes, not parents of classes such as `train` and `test`.

    They are parents if all have names of splits, or two have that contain no images directly, or if no folder contains images
    directly. The exception is one subfolder of the same name in each folder, with all of its images, as `<class>/images/` in Tiny
    ImageNet.

    Args:
        root: root folder.
        files: all images in each folder and its subfolders.
        where: key of the data, for messages.

    Raises:
        ConfigError: the folders are parents of classes.
    """
    start = len(str(root / "_")) - 1
    by_folder: dict[str, list[Parts]] = {
        folder: [tuple(path[start:].split("/")) for path in paths] for folder, paths in files.items() if paths
    }
    if not by_folder:
        return
    key = f"{where}.root={root}"
    splits = [folder for folder in by_folder if SPLIT.fullmatch(folder)]
    nested = [folder for folder, places in by_folder.items() if min(map(len, places)) > 2]
    if len(splits) == len(by_folder) or len({*splits} & {*nested}) > 1:
        raise ConfigError(
            f"{key} is the parent folder of splits, not of classes: {listing(splits)}. Use "
            f"{where}.root={_class_level(root, by_folder)}."
        )
    if len(nested) < len(by_folder):
        return
    places = [place for places in by_folder.values() for place in places]
    if len({place[1:-1] for place in places}) == 1 and all(len(place) == 3 for place in places):
        return  # all images are in `<class>/<name>/`, with the same name for all classes
    first = next(iter(by_folder))
    raise ConfigError(
        f"{key} is not the parent folder of the classes: its folders ({listing([*by_folder])}) contain only folders of images, such as "
        f"{'/'.join(by_folder[first][0][:-1])}. Use {where}.root={_class_level(root, by_folder)}. If they are the classes, name them: "
        f"{where}.classes={{{first}: {first.replace('_', ' ')}, …}}."
    )


def _class_level(root: Path, by_folder: dict[str, list[Parts]]) -> Path:
    """Return the folder to suggest as root: a parent of folders with images, of a test split if possible."""

    def preference(folder: str) -> tuple[bool, int]:
        starts = [folder.lower().startswith(name) for name in SCORED_FIRST]
        rank = starts.index(True) if SPLIT.fullmatch(folder) else len(starts)
        return len({place[1] for place in by_folder[folder] if len(place) > 2}) < 2, rank

    while True:
        folder = min(by_folder, key=preference)
        root, places = root / folder, [place[1:] for place in by_folder[folder]]
        by_folder = {}
        for place in places:
            by_folder.setdefault(place[0], []).append(place)
        is_split = all(SPLIT.fullmatch(name) for name in by_folder)
        if any(len(place) < 2 for place in places) or (not is_split and any(len(place) == 2 for place in places)):
            return root


def require_tables(tables: Any, where: str) -> None:
    """Check that tables exist.

    Args:
        tables: path or pattern, or a list of them.
        where: key of the task, for messages; empty for a command that has the keys itself.

    Raises:
        ConfigError: a table does not exist, or a pattern matches no file.
    """
    at = f"{where}." if where else ""
    given = [tables] if isinstance(tables, str) else tables
    if not isinstance(given, list) or not given or not all(isinstance(table, str) for table in given):
        raise ConfigError(f"{at}table={tables} must be a file, a pattern, or a list of those.")
    try:
        expand(given)
    except ConfigError as error:
        raise ConfigError(f"{at}table: {error}") from error


def read_pairs(
    table: Any,
    where: str,
    data: TableConfig,
    *,
    caption_key: str | Sequence[str] | None = None,
    label_key: str | None = None,
    columns: Sequence[str] = (),
) -> PairTable:
    """Read a table (`data.tables.read_table`), with the keys of the task in error messages instead of those of a run."""
    at = f"{where}." if where else ""
    try:
        return read_table(
            table,
            image_key=data.image_key,
            caption_key=tuple(caption_key) if isinstance(caption_key, list) else caption_key,
            label_key=label_key,
            columns=tuple(columns),
            image_root=data.image_root,
            caption_list=data.caption_list,
            caption_lines=data.caption_lines,
            format=data.table_format,
            header=tuple(data.header) if isinstance(data.header, list) else data.header,
            val_fraction=data.held_out_fraction,
            val_seed=data.held_out_seed,
            held_out=data.held_out_fraction is not None,
            separator=data.separator,
            encoding=data.encoding,
            on_bad_row=data.on_bad_row,
            filter=data.filter,
        )
    except (ConfigError, DataError) as error:
        keys = f"caption_key|label_key|columns|{'|'.join(TableConfig.model_fields)}"
        message = str(error).replace("data.format", f"{at}table_format")
        raise type(error)(re.sub(rf"\bdata\.({keys})\b", rf"{at}\1", message)) from error


def from_table(table: Any, data: LabeledDataConfig, where: str = "task") -> LabeledImages:
    """Return the images of a table, labeled by a column; the classes are its distinct values.

    Classes are ordered by value if all are numbers, else by code point. An image in several rows, as with several captions,
    counts once. An image without a label is left out, as in validation.
    """
    pairs = read_pairs(table, where, data, label_key=data.label_key)
    labels = label_of_images(pairs)
    labeled = [image for image, label in enumerate(labels) if label]
    if not labeled:
        raise DataError(f"{table}: the column {data.label_key} is empty in every row.")
    present = in_order(labels[image] for image in labeled)
    matched = match(present, present, data.classes, str(table), where)
    return LabeledImages(
        TableImages(pairs, [int(pairs.rows_of(image)[0]) for image in labeled], data.allow_outside_root),
        [matched.position[labels[image]] for image in labeled],
        matched.names,
        str(table),
        matched.keys,
        unlabeled=len(labels) - len(labeled),
        imagenet=matched.imagenet,
        about=pairs.shortcomings(),
    )
