"""Reader for a folder of images with files of the same name that have their captions, or with a subfolder per class."""

import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from clip_exp.config.data import Format, OnBadRow
from clip_exp.data.tables.reader import (
    IMAGE_SUFFIXES,
    IMAGES,
    BadRows,
    BadValue,
    RowBlock,
    TableOptions,
    files_in,
    folders_in,
    is_caption,
)
from clip_exp.data.tables.records import Records
from clip_exp.data.tables.samples import SampleReader
from clip_exp.data.tables.tar import Member
from clip_exp.errors import DataError


class FolderReader:
    """`tables.reader.Reader` for a folder, whose subfolders are read, too. Files and folders are sorted by name.

    The files with the same name but for the extension, in the same folder, are a sample; see `tables.samples`. If no image has a
    caption and all are in subfolders, these are the classes: the captions of an image are the templates with its class, and its
    label is the class.

    Args:
        path: existing folder.
        options: columns and rows to read.
    """

    def __init__(self, path: Path, options: TableOptions) -> None:
        self.path, self.options = path, options
        self.bad = BadRows(path, options.on_bad_row is OnBadRow.skip, unit="image")
        self.bytes_read = 0
        self._records = Records(options, self.bad)

    def blocks(self) -> Iterator[RowBlock]:
        """See `tables.reader.Reader`."""
        classes = self.options.format is Format.class_folders
        if self.options.format is Format.auto:
            classes = self.options.caption_key is not None and has_class_folders(self.path)
        reader = SampleReader(self.options, lambda member: Path(member.name).read_bytes())
        root = os.path.join(str(self.path), "")
        number = 0
        for sample in _samples(str(self.path)):
            for extension in (each for each in sample if each in IMAGES):
                number += 1
                name = sample[extension].removeprefix(root)
                try:
                    if classes:
                        record, size = self._of_class(name), 0
                    else:
                        members = {
                            each: _member(path)
                            for each, path in sample.items()
                            if each == extension or each not in IMAGES
                        }
                        record = {**reader.record_of(members, members[extension]), self.options.image_key: name}
                        size = sum(member.size for each, member in members.items() if each != extension)
                    self._records.add(number, record, size)
                except OSError as error:
                    detail = f"a file of the sample {name!r} cannot be read: {error.strerror}"
                    self.bad.add(number, "cannot be read", detail)
                except BadValue as bad:
                    self.bad.add(number, bad.reason, f"{bad.detail} (image {name!r})")
                if self._records.is_full:
                    yield self._records.block()
        if not number:
            raise DataError(
                f"{self.path} has no images: a folder must have images with a .txt or .json of the same name."
            )
        if len(self._records):
            yield self._records.block()
        if problem := self._records.unknown_column():
            raise DataError(f"{self.path} {problem}")

    def _of_class(self, name: str) -> dict[str, object]:
        folder = os.path.basename(os.path.dirname(name)).replace("_", " ")
        if not folder:
            raise BadValue("no class", "it is in no subfolder, whose name would be its class")
        values: dict[str, object] = {self.options.image_key: name, "class": folder}
        for setting, column in self.options.requested.items():
            if is_caption(setting):
                values[column] = [template.replace("{}", folder) for template in self.options.templates or ("{}",)]
            elif setting == "label_key":
                values[column] = folder
        return values


def _samples(top: str) -> Iterator[dict[str, str]]:
    """Yield the files of each name by extension."""
    for folder, names in folders_in(top):
        samples: defaultdict[str, dict[str, str]] = defaultdict(dict)
        for name in names:
            stem, extension = os.path.splitext(name)
            if stem and not name.startswith("."):
                samples[stem].setdefault(extension[1:].lower(), os.path.join(folder, name))
        yield from samples.values()


def _member(path: str) -> Member:
    return Member(path, 0, os.stat(path).st_size, "")


def has_images(folder: Path) -> bool:
    """Return True if a folder or one of its subfolders has an image."""
    return any(path.lower().endswith(IMAGE_SUFFIXES) for path in files_in(str(folder)))


def has_class_folders(folder: Path) -> bool:
    """Return True if all images are in subfolders, and none has a file of the same name with a caption."""
    found = False
    for sample in _samples(str(folder)):
        image = next((sample[extension] for extension in IMAGES if extension in sample), None)
        if image is None:
            continue
        if sample.keys() - {*IMAGES} or os.path.dirname(image) == str(folder):
            return False
        found = True
    return found
