"""Reader for JSON documents: an array of objects, annotations of COCO and Karpathy's splits, and captions by path.

[{"filepath": "1.jpg", "title": "a dog"}, …]
{"images": [{"id": 1, "file_name": "1.jpg"}, …], "annotations": [{"image_id": 1, "caption": "a dog"}, …]}
{"images": [{"filename": "1.jpg", "split": "train", "sentences": [{"raw": "a dog"}, …]}, …]}
{"1.jpg": ["a dog", "a pet"], …}
"""

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clip_exp.config.data import Format, OnBadRow
from clip_exp.data.tables.reader import BadRows, BadValue, RowBlock, TableOptions, is_caption, unreadable
from clip_exp.data.tables.records import Records
from clip_exp.errors import ConfigError, DataError

MAX_BYTES = 2 << 30  # a larger document would take many times its size of memory
_HEAD = 1 << 16  # bytes
_KINDS = "an array of objects, COCO captions (images and annotations), Karpathy's splits (images with sentences), or captions by path"


def is_document(path: Path, head: bytes) -> bool:
    """Return True if a JSON file is one document, and not an object per line.

    Args:
        path: existing file.
        head: its first bytes.
    """
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith(b"["):
        return True
    if not text.startswith(b"{") or path.suffix.lower() != ".json":
        return text.partition(b"\n")[0].strip() == b"{"
    with open(path, "rb") as file:
        first = file.read(_HEAD).removeprefix(b"\xef\xbb\xbf").lstrip()
    line, found, rest = first.partition(b"\n")
    if found:
        try:
            json.loads(line)
        except ValueError:
            return True
        return not rest.lstrip().startswith(b"{") and _is_mapping(json.loads(line))
    # A single line: an object with texts or numbers only is one of JSON Lines.
    try:
        return _is_mapping(json.loads(first))
    except ValueError:
        return True


def _is_mapping(value: dict[str, Any]) -> bool:
    """Return True for the only object of a file if it is a document rather than a row."""
    if isinstance(value.get("images"), list):
        return True
    return bool(value) and all("." in name and isinstance(each, str | list) for name, each in value.items())


class DocumentReader:
    """`tables.reader.Reader` for a JSON document of one of the kinds above.

    Args:
        path: existing file.
        options: columns and rows to read. Except for an array of objects, image and captions have no keys of their own, so those of
            the options name them.
    """

    def __init__(self, path: Path, options: TableOptions) -> None:
        self.path, self.options = path, options
        self.bad = BadRows(path, options.on_bad_row is OnBadRow.skip, unit="entry")
        self.bytes_read = 0
        self._records = Records(options, self.bad)

    def blocks(self) -> Iterator[RowBlock]:
        """See `tables.reader.Reader`."""
        document = self._load()
        for number, record in enumerate(self._entries(document), 1):
            try:
                if not isinstance(record, dict):
                    raise BadValue("not an object", "it is not an object")
                self._records.add(number, record, 0)
            except BadValue as bad:
                self.bad.add(number, bad.reason, bad.detail)
            if self._records.is_full:
                yield self._records.block()
        if len(self._records):
            yield self._records.block()
        if problem := self._records.unknown_column():
            raise DataError(f"{self.path} {problem}")

    def _load(self) -> Any:
        try:
            if (size := self.path.stat().st_size) > MAX_BYTES:
                raise DataError(
                    f"{self.path} is a JSON document of {size / 1e9:.1f} GB, which would not fit into memory: convert it to JSON Lines "
                    f"(jq -c '.[]' {self.path.name} > pairs.jsonl)."
                )
            with open(self.path, encoding="utf-8-sig") as file:
                document = json.load(file)
        except OSError as error:
            raise unreadable(self.path, error) from error
        except RecursionError as error:
            raise DataError(f"{self.path} is not a table: its JSON is nested too deeply.") from error
        except ValueError as error:  # also UnicodeDecodeError
            raise DataError(f"{self.path} is not valid JSON: {error}. Check that the file is complete.") from error
        self.bytes_read = size
        return document

    def _entries(self, document: Any) -> Iterator[Any]:
        kind = _kind(document)
        requested = self.options.format
        if requested is not Format.auto and requested is not kind:
            raise ConfigError(
                f"{self.path} is not of data.format={requested}: it is {kind or 'another JSON document'}."
            )
        if kind is Format.json:
            if isinstance(document, list):
                yield from document
            else:
                yield from (self._entry(name, captions, {}) for name, captions in document.items())
        elif kind is Format.coco:
            yield from self._of_coco(document)
        elif kind is Format.karpathy:
            yield from self._of_karpathy(document)
        else:
            found = ", ".join(map(repr, list(document)[:5])) if isinstance(document, dict) else type(document).__name__
            raise DataError(f"{self.path} is a JSON document with {found}, but it must be {_KINDS}.")

    def _of_coco(self, document: dict[str, Any]) -> Iterator[dict[str, Any]]:
        captions: defaultdict[Any, list[Any]] = defaultdict(list)
        for annotation in document["annotations"]:
            if not isinstance(annotation, dict) or "caption" not in annotation:
                raise DataError(
                    f"{self.path} has annotations without captions: name the file of captions, captions_….json."
                )
            captions[repr(annotation.get("image_id"))].append(annotation["caption"])
        for image in document["images"]:
            if isinstance(image, dict):
                yield self._entry(image.get("file_name"), captions.get(repr(image.get("id"))), image)
            else:
                yield image

    def _of_karpathy(self, document: dict[str, Any]) -> Iterator[Any]:
        for image in document["images"]:
            if not isinstance(image, dict):
                yield image
                continue
            name, folder = image.get("filename"), image.get("filepath")
            path = f"{folder}/{name}" if isinstance(folder, str) and isinstance(name, str) else name
            sentences = image.get("sentences")
            if isinstance(sentences, list):
                sentences = [each.get("raw") if isinstance(each, dict) else each for each in sentences] or None
            yield self._entry(path, sentences, image)

    def _entry(self, path: Any, captions: Any, values: dict[str, Any]) -> dict[str, Any]:
        names = self.options.requested
        columns = [name for setting, name in names.items() if is_caption(setting)]
        return {**values, names["image_key"]: path, **dict.fromkeys(columns[:1], captions)}


def _kind(document: Any) -> Format | None:
    if isinstance(document, list):
        return Format.json
    if not isinstance(document, dict) or not document:
        return None
    images = document.get("images")
    if isinstance(images, list):
        first = images[0] if images else None
        if isinstance(document.get("annotations"), list):
            return Format.coco
        return Format.karpathy if isinstance(first, dict) and "sentences" in first else None
    return Format.json if all(isinstance(each, str | list) for each in document.values()) else None
