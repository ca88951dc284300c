"""Folders that data sets come in, and the tables in them."""

import json
from pathlib import Path

from clip_exp.config.data import Format
from clip_exp.data.tables.folders import has_images
from clip_exp.errors import ConfigError

# Tables of images in the layout `imagefolder` of the library `datasets`
_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
# Extensions of the tables of a folder, in the order in which they are looked for: img2dataset writes a .parquet next to each .tar.
_TABLES = (".tar", ".parquet", ".arrow", ".jsonl", ".csv", ".tsv")


def tables_in(folder: Path, layout: Format = Format.auto) -> list[Path]:
    """Return the tables of a folder in order, or the folder itself if its images are the data; an empty list for neither.

    Recognized are data sets saved by `datasets.save_to_disk`, folders of images with a metadata.csv, folders of images with captions
    in files of the same names, class folders, and folders of shards or tables of one kind.

    Raises: ConfigError for a folder of several splits, or of tables that are not all one data set.
    """
    if layout in (Format.folder, Format.class_folders):
        return [folder]
    if (folder / "dataset_dict.json").is_file():
        splits = ", ".join(sorted(path.parent.name for path in folder.glob("*/state.json")))
        raise ConfigError(f"{folder} has several splits ({splits}): name one of them, such as {folder}/train.")
    if (folder / "state.json").is_file() and (files := _saved(folder)):
        return files
    for name in _METADATA:
        if (folder / name).is_file():
            return [folder / name]
    for suffix in _TABLES:
        found = sorted(path for path in folder.glob(f"*{suffix}") if path.is_file())
        # img2dataset's tables next to folders of images describe these, and have no images.
        if found and (suffix == ".tar" or not has_images(folder)):
            if len({path.name.partition("-")[0] for path in found}) > 1 and suffix != ".tar" and not _numbered(found):
                raise ConfigError(
                    f"{folder} has several tables: name those to read, for example {found[0]}, or all of them: '{folder}/*{suffix}'."
                )
            return found
    return [folder] if has_images(folder) else []


def _saved(folder: Path) -> list[Path]:
    """Return the files of a data set that `datasets.save_to_disk` saved."""
    try:
        names = [file["filename"] for file in json.loads((folder / "state.json").read_text("utf-8"))["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [folder / Path(name).name for name in names]


def _numbered(files: list[Path]) -> bool:
    return all(path.stem.isdecimal() for path in files)
