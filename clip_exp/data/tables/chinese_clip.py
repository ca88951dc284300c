"""Reader for the layout of Chinese-CLIP: `<split>_imgs.tsv` (id, base64) and `<split>_texts.jsonl` (text, image_ids)."""

import base64
import binascii
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from clip_exp.config.data import OnBadRow
from clip_exp.data.tables.reader import BadRows, BadValue, RowBlock, TableOptions, is_caption, unreadable
from clip_exp.data.tables.records import Records, parse_object
from clip_exp.errors import ConfigError, DataError

_IMAGES, _TEXTS = "_imgs.tsv", "_texts.jsonl"
_MAX_LINE = 512 << 20  # bytes of an image in base64
_BLOCK_BYTES = 64 << 20


class ChineseClipReader:
    """`tables.reader.Reader` for Chinese-CLIP's table of images; its captions are in the other file, next to it.

    Args:
        path: existing file `<split>_imgs.tsv`.
        options: columns and rows to read.
    """

    def __init__(self, path: Path, options: TableOptions) -> None:
        self.path, self.options = path, options
        self.bad = BadRows(path, options.on_bad_row is OnBadRow.skip)
        self.bytes_read = 0
        self._records = Records(options, self.bad)

    def blocks(self) -> Iterator[RowBlock]:
        """See `tables.reader.Reader`."""
        captions = self._captions()
        columns = [name for setting, name in self.options.requested.items() if is_caption(setting)]
        images: list[bytes] = []
        size = 0
        try:
            with open(self.path, "rb") as file:
                for number, line in enumerate(iter(lambda: file.readline(_MAX_LINE), b""), 1):
                    self.bytes_read += len(line)
                    try:
                        name, image = _image(line)
                        record = {self.options.image_key: name, **dict.fromkeys(columns[:1], captions.get(name))}
                        self._records.add(number, record, 0)
                    except BadValue as bad:
                        self.bad.add(number, bad.reason, bad.detail)
                        continue
                    images.append(image)
                    size += len(image)
                    if self._records.is_full or size >= _BLOCK_BYTES:
                        yield self._block(images)
                        images, size = [], 0
        except OSError as error:
            raise unreadable(self.path, error) from error
        if images:
            yield self._block(images)

    def _block(self, images: list[bytes]) -> RowBlock:
        block = self._records.block()
        return RowBlock(block.columns, block.numbers, block.extra, pa.array(images, pa.large_binary()))

    def _captions(self) -> dict[str, list[str]]:
        """Return the texts of each image by its id."""
        if not self.path.name.endswith(_IMAGES):
            raise ConfigError(
                f"{self.path} is not a table of images of Chinese-CLIP: its name must end with {_IMAGES}."
            )
        path = self.path.with_name(self.path.name.removesuffix(_IMAGES) + _TEXTS)
        captions: defaultdict[str, list[str]] = defaultdict(list)
        try:
            with open(path, "rb") as file:
                for number, line in enumerate(file, 1):
                    if line.isspace():
                        continue
                    try:
                        record = parse_object(line)
                        for image in record["image_ids"]:
                            captions[str(image)].append(record["text"])
                    except (BadValue, KeyError, TypeError) as error:
                        detail = error.detail if isinstance(error, BadValue) else "it must have text and image_ids"
                        raise DataError(f"{path}, line {number}: {detail}.") from error
        except OSError as error:
            raise unreadable(path, error) from error
        return captions


def _image(line: bytes) -> tuple[str, bytes]:
    name, found, encoded = line.rstrip(b"\r\n").partition(b"\t")
    if not found:
        raise BadValue("wrong number of fields", "it must have an id, a TAB and an image in base64")
    try:
        padded = encoded + b"=" * (-len(encoded) % 4)
        return name.decode(), base64.b64decode(padded.translate(bytes.maketrans(b"-_", b"+/")), validate=True)
    except (binascii.Error, UnicodeDecodeError) as error:
        raise BadValue("not base64", "its image is not base64") from error
