"""Labelled images to evaluate on: `LabeledDataConfig` to `LabeledImages`. No torch."""

import re
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
Place = tuple[str, ...]  # of an image below the root: its folders and its name


def labeled_images(
    data: LabeledDataConfig,
    where: str,
    output_dir: str,
    split: str | None = None,
) -> LabeledImages:
    """The labelled images that a part of the configuration describes.

    Args:
        where: the part's key, as `task.flowers`, for messages.
        output_dir: of the runs; generated data is written below it.
        split: what to read where `data.split` is None: "train", or None for the held-out part.
    Raises:
        ConfigError: not exactly one source; a file or folder is missing; `classes` does not fit the data.
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
    """`<root>/<class>/…/<image>`: a class per folder, in the order of the folders' names.

    Names that are all numbers are ordered by value, as ImageNetV2's, others by code point. Hidden files and files that are
    no images are left out. Under `labels` a name is its folder's with `_` as a space.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise ConfigError(
            f"{where}.root={root}: no such folder. Give a folder that holds one folder of images per class."
        )
    found = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    folders = in_order(name.strip(BLANKS) for name in found)
    files: dict[str, list[str]] = {folder: [] for folder in folders}
    for name in found:
        files[name.strip(BLANKS)] += find_images(root / name)
    if not isinstance(classes, dict):  # which names the folders that are classes
        require_class_folders(root, files, where)
    if not any(files.values()):
        loose = ""
        if find_images(root, below=False):
            published = isinstance(classes, str) and classes in CLASS_SETS
            with_file = f", or name a file of their labels: {where}.ground_truth=FILE" if published else ""
            loose = f" There are images in the folder itself: sort them into one folder per class{with_file}."
        raise DataError(f"{where}.root={root} holds no folder with images.{loose}")
    matched = match(folders, [folder.replace("_", " ") for folder in folders], classes, str(root), where)
    paths = [path for folder in folders for path in files[folder]]
    labels = [matched.position[folder] for folder in folders for _ in files[folder]]
    return LabeledImages(ImageFiles(paths), labels, matched.names, str(root), matched.keys, imagenet=matched.imagenet)


def require_class_folders(root: Path, files: dict[str, list[str]], where: str) -> None:
    """Refuse a root that is above the classes, whose images would be scored as "train" against "test".

    That is so where all folders are called like splits, or two are that hold no images of their own; and where no folder holds images of its
    own, only folders that do. An exception are folders that each hold one folder of the same name with all of their images, as
    `<class>/images/` in Tiny ImageNet.

    Args:
        files: of each folder all images in it and below.
    """
    start = len(str(root / "_")) - 1
    holding: dict[str, list[Place]] = {
        folder: [tuple(path[start:].split("/")) for path in paths] for folder, paths in files.items() if paths
    }
    if not holding:
        return
    key = f"{where}.root={root}"
    splits = [folder for folder in holding if SPLIT.fullmatch(folder)]
    nested = [folder for folder, places in holding.items() if min(map(len, places)) > 2]
    if len(splits) == len(holding) or len({*splits} & {*nested}) > 1:
        raise ConfigError(
            f"{key} is above the classes: {listing(splits)} {'is a split' if len(splits) == 1 else 'are splits'}. Give "
            f"{where}.root={_class_level(root, holding)}."
        )
    if len(nested) < len(holding):
        return
    places = [place for places in holding.values() for place in places]
    if len({place[1:-1] for place in places}) == 1 and all(len(place) == 3 for place in places):
        return  # all images are in `<class>/<name>/`, of one name
    first = next(iter(holding))
    raise ConfigError(
        f"{key} is above the classes: its folders ({listing([*holding])}) hold no images, only folders of images, such as "
        f"{'/'.join(holding[first][0][:-1])}. Give {where}.root={_class_level(root, holding)}. If they are the classes, name them: "
        f"{where}.classes={{{first}: {first.replace('_', ' ')}, …}}."
    )


def _class_level(root: Path, holding: dict[str, list[Place]]) -> Path:
    """Return the folder to give instead: down from the root until folders hold images; a held-out split with classes, if there is one."""

    def preference(folder: str) -> tuple[bool, int]:
        starts = [folder.lower().startswith(name) for name in SCORED_FIRST]
        rank = starts.index(True) if SPLIT.fullmatch(folder) else len(starts)
        return len({place[1] for place in holding[folder] if len(place) > 2}) < 2, rank

    while True:
        folder = min(holding, key=preference)
        root, places = root / folder, [place[1:] for place in holding[folder]]
        holding = {}
        for place in places:
            holding.setdefault(place[0], []).append(place)
        is_split = all(SPLIT.fullmatch(name) for name in holding)
        if any(len(place) < 2 for place in places) or (not is_split and any(len(place) == 2 for place in places)):
            return root


def require_tables(tables: Any, where: str) -> None:
    """Raises ConfigError if a table or a pattern names no file; `where` is the task."""
    given = [tables] if isinstance(tables, str) else tables
    if not isinstance(given, list) or not given or not all(isinstance(table, str) for table in given):
        raise ConfigError(f"{where}.table={tables} must be a file, a pattern, or a list of those.")
    try:
        expand(given)
    except ConfigError as error:
        raise ConfigError(f"{where}.table: {error}") from error


def read_pairs(
    table: Any, where: str, data: TableConfig, *, caption_key: str | None = None, label_key: str | None = None
) -> PairTable:
    """`data.tables.read_table`, whose messages name the task's keys instead of a run's."""
    try:
        return read_table(
            table,
            image_key=data.image_key,
            caption_key=caption_key,
            label_key=label_key,
            image_root=data.image_root,
            separator=data.separator,
            encoding=data.encoding,
            on_bad_row=data.on_bad_row,
            filter=data.filter,
        )
    except (ConfigError, DataError) as error:
        keys = "image_key|caption_key|label_key|image_root|separator|encoding|on_bad_row|filter"
        raise type(error)(re.sub(rf"\bdata\.({keys})\b", rf"{where}.\1", str(error))) from error


def from_table(table: Any, data: LabeledDataConfig, where: str = "task") -> LabeledImages:
    """Images of a table, labelled by a column; the classes are its distinct values.

    Values that are all numbers are ordered by value, others by code point. An image in several rows, as with several
    captions, counts once; one without a label is left out, as in validation.
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
