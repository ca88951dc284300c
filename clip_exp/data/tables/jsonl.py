"""Reader for JSON Lines: one object per line, in UTF-8."""

import codecs
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from clip_exp.config.data import OnBadRow
from clip_exp.data.tables.reader import BadRows, BadValue, RowBlock, TableOptions, unreadable
from clip_exp.data.tables.records import MAX_LINE, Records, parse_object
from clip_exp.errors import DataError

_HEAD = 4096  # bytes by which other kinds of files are recognized
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class JsonLinesReader:
    """`tables.reader.Reader` for JSON Lines.

    Paths must be strings, captions strings or lists of strings (`reader.value_of`); further columns may also be numbers. Other keys are ignored,
    but no key may appear twice. Blank lines are skipped. `NaN`, which Python writes although it is not valid JSON, is a
    missing number.

    Args:
        path: existing file.
        options: columns and rows to read.
    """

    def __init__(self, path: Path, options: TableOptions) -> None:
        self.path = path
        self.bad = BadRows(path, options.on_bad_row is OnBadRow.skip)
        self.bytes_read = 0
        self._records = Records(options, self.bad)

    def blocks(self) -> Iterator[RowBlock]:
        """See `tables.reader.Reader`."""
        try:
            with open(self.path, "rb") as file:
                self._check_kind(file)
                yield from self._blocks(file)
        except OSError as error:
            raise unreadable(self.path, error) from error
        if problem := self._records.unknown_column():
            raise DataError(f"{self.path} {problem}")

    def _check_kind(self, file: BinaryIO) -> None:
        head = file.read(_HEAD)
        start = len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0
        if not head:
            raise DataError(
                f"{self.path} is empty: it must have one JSON object per line, one for each image-text pair."
            )
        if head.startswith(_UTF16) or b"\0" in head[:4]:  # JSON starts with two ASCII characters
            raise DataError(
                f"{self.path} is UTF-16 or UTF-32, but JSON Lines must be UTF-8: convert it (iconv -f utf-16 -t utf-8)."
            )
        file.seek(start)

    def _blocks(self, file: BinaryIO) -> Iterator[RowBlock]:
        for line, text in enumerate(_lines(file), 1):
            self.bytes_read += len(text)
            if text.isspace():
                continue
            try:
                self._records.add(line, parse_object(text), len(text))
            except BadValue as bad:
                self.bad.add(line, bad.reason, bad.detail)
                continue
            if self._records.is_full:
                yield self._records.block()
        if len(self._records):
            yield self._records.block()


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Yield the lines; of a line that is too long, only the start."""
    while line := file.readline(MAX_LINE + 1):
        yield line
        while len(line) > MAX_LINE and not line.endswith(b"\n"):
            line = file.readline(MAX_LINE + 1) or b"\n"
