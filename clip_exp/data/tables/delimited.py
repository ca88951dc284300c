"""Delimited text as blocks of rows: encoding, layout and records put together.

Blocks without a fault are cut and parsed at once (`parse_block`); what is unusual is read strictly, record by record where need be
(`RecordReader`). Where both can read, they give the same rows.

Quoting is RFC 4180's: a quote that is never closed must not swallow the rows after it. A record whose quoting is broken is
taken as it is written where its first line alone has the right number of fields, and is a bad row elsewhere.
"""

import csv
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from pyarrow import csv as arrow_csv

from clip_exp.config.data import OnBadRow
from clip_exp.data.tables.columns import string_array, string_buffers
from clip_exp.data.tables.layouts import Columns, Layout, describe, find_layout, parse_separator
from clip_exp.data.tables.lines import Lines, Utf8Blocks, count_lines, find_encoding
from clip_exp.data.tables.reader import MAX_CAPTION, BadRows, BadValue, RowBlock, TableOptions, text_of
from clip_exp.errors import ConfigError, DataError

_SAMPLE_LINES = 50

log = logging.getLogger(__name__)

MAX_FIELD = 131_072  # characters, the csv module's own limit: a longer one is most likely a quote that never closes


class DelimitedReader:
    """A `tables.reader.Reader` of text whose columns a character separates: CSV of any common dialect.

    Args:
        path: an existing file: separated by comma, TAB, semicolon or bar, with a header that has the keys, or two columns
            without one; in UTF-8, UTF-16 or an encoding that can be guessed.
        options: what to read.
    """

    def __init__(self, path: Path, options: TableOptions) -> None:
        self.path = path
        self.columns = Columns.of(options)
        self.separator = parse_separator(options.separator)
        self.bad = BadRows(path, options.on_bad_row is OnBadRow.skip)
        self.bytes_read = 0
        self._encoding = options.encoding

    def blocks(self) -> Iterator[RowBlock]:
        """See `tables.reader.Reader`."""
        try:
            source = Utf8Blocks(self.path, find_encoding(self.path, self._encoding))
            lines = Lines(source)
            layout = find_layout(self.path, self._first_lines(lines), self.columns, self.separator)
            for block in self._read(lines, layout):
                self.bytes_read = source.bytes_read
                yield block
        except OSError as error:
            raise ConfigError(f"The table {self.path} cannot be read: {error.strerror or error}.") from error

    def _read(self, lines: Lines, layout: Layout) -> Iterator[RowBlock]:
        reader = RecordReader(self.path, layout, self.bad)
        if layout.header:
            reader.skip_header(lines)
        while block := lines.peek_block():
            if rows := parse_block(block, layout):
                yield _row_block(layout, rows.columns, rows.lines + (lines.number + 1))
                lines.skip(rows.size, rows.line_count)
                continue
            for numbers, records in reader.blocks(lines, count_lines(block)):
                yield _row_block(layout, _columns(records, layout), np.asarray(numbers, dtype=np.int64))
        reader.report()

    def _first_lines(self, lines: Lines) -> list[str]:
        first = lines.take(_SAMPLE_LINES)
        lines.put_back(first)
        if not any(line.strip() for line in first):
            raise DataError(f"{self.path} is empty: it needs a header and a row per image-text pair.")
        return [line for line in first if line.strip()]


def _columns(records: Sequence[Sequence[str]], layout: Layout) -> dict[int, pa.LargeStringArray]:
    fields = list(zip(*records, strict=True))
    return {index: string_array(fields[index]) for index in layout.wanted}


def _row_block(layout: Layout, fields: dict[int, pa.LargeStringArray], lines: np.ndarray) -> RowBlock:
    columns = {setting: fields[index] for setting, index in layout.indices.items()}
    extra = {name: fields[index] for name, index in layout.extra.items()}
    return RowBlock(columns, lines, None, extra or None)


# Blocks without a fault, cut and parsed at once.

_QUOTE, _NEWLINE, _RETURN = b'"\n\r'


class FastRows(NamedTuple):
    """The records at the start of a block."""

    columns: dict[int, pa.LargeStringArray]  # by index of the field
    lines: np.ndarray  # int64: line that each record starts in, 0 for the block's first
    size: int  # bytes
    line_count: int


class _Cut(NamedTuple):
    """Where the records of a block end."""

    newlines: np.ndarray  # all of them, up to the last record's end
    ends: np.ndarray  # which of them end records: indices of `newlines`
    quoting: bool  # whether quotes mean anything


def parse_block(block: bytes, layout: Layout) -> FastRows | None:
    """The whole records of a block that starts with one; None if anything is unusual, and the strict reader must look.

    Args:
        block: UTF-8.
        layout: of the table.
    """
    cut = _cut(block, layout.separator)
    if cut is None:
        return None
    ends = cut.newlines[cut.ends]
    lengths = np.diff(ends, prepend=-1)
    size = int(ends[-1]) + 1
    text = memoryview(block)[:size]
    if lengths.max() > MAX_FIELD or not _is_utf8(text):
        return None
    columns = _fields(text, layout, cut.quoting)
    if columns is None or not _are_good(columns, len(ends), layout):
        return None
    lines = np.concatenate([[0], cut.ends[:-1] + 1])
    return FastRows(columns, lines, size, len(cut.newlines))


def _cut(block: bytes, separator: str) -> _Cut | None:
    if not separator.isascii() or b"\0" in block or block.startswith(b"\xef\xbb\xbf"):  # Arrow drops a mark anywhere
        return None
    data = np.frombuffer(block, dtype=np.uint8)
    newlines = np.flatnonzero(data == _NEWLINE)
    if not len(newlines) or (b"\r" in block and not _only_before(data, _RETURN, _NEWLINE)):
        return None
    if b'"' not in block:
        return _Cut(newlines, np.arange(len(newlines)), False)
    quotes = np.flatnonzero(data == _QUOTE)
    starts_field = _follows(data, quotes, separator)
    if not starts_field.any():
        return _Cut(newlines, np.arange(len(newlines)), False)
    ends = np.flatnonzero(np.searchsorted(quotes, newlines) % 2 == 0)
    if not len(ends):
        return None
    newlines = newlines[: ends[-1] + 1]
    inside = quotes < newlines[-1]
    good = _are_balanced(data, quotes[inside], starts_field[inside], separator)
    return _Cut(newlines, ends, True) if good else None


def _follows(data: np.ndarray, places: np.ndarray, separator: str) -> np.ndarray:
    """Which places are at the start of a field, outside quotes."""
    before = data[places - 1]  # of the first byte: the last, whatever it is
    return (before == ord(separator)) | (before == _NEWLINE) | (places == 0)


def _are_balanced(data: np.ndarray, quotes: np.ndarray, starts_field: np.ndarray, separator: str) -> bool:
    """Whether each quote opens a field at its start, closes it at its end, or is one of two in a quoted field."""
    doubled = np.diff(quotes) == 1  # a quote and the next
    after = data[quotes[1::2] + 1]
    ends_field = (after == ord(separator)) | (after == _NEWLINE) | (after == _RETURN)
    doubled_before = np.concatenate([[False], doubled[1::2]])
    doubled_after = np.concatenate([doubled[1::2], [False]])
    return bool((starts_field[0::2] | doubled_before).all() and (ends_field | doubled_after).all())


def _only_before(data: np.ndarray, first: int, second: int) -> bool:
    """Whether every `first` has `second` after it."""
    places = np.flatnonzero(data == first) + 1
    return bool(places[-1] < len(data) and (data[places] == second).all())


def _is_utf8(text: memoryview) -> bool:
    try:
        str(text, "utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _fields(text: memoryview, layout: Layout, quoting: bool) -> dict[int, pa.LargeStringArray] | None:
    names = {index: str(index) for index in layout.wanted}
    try:
        table = arrow_csv.read_csv(
            pa.BufferReader(pa.py_buffer(text)),
            arrow_csv.ReadOptions(
                use_threads=False, block_size=len(text) + 1, column_names=[str(index) for index in range(layout.width)]
            ),
            arrow_csv.ParseOptions(
                delimiter=layout.separator, quote_char='"' if quoting else False, newlines_in_values=quoting
            ),
            arrow_csv.ConvertOptions(
                check_utf8=False,  # the whole block was
                column_types=dict.fromkeys(names.values(), pa.large_string()),
                include_columns=list(names.values()),
                strings_can_be_null=False,
            ),
        )
    except pa.ArrowInvalid:  # a wrong number of fields
        return None
    return {index: table.column(name).combine_chunks() for index, name in names.items()}


def _are_good(columns: dict[int, pa.LargeStringArray], count: int, layout: Layout) -> bool:
    """Whether there are as many records as lines say, none of which `RecordReader` might object to."""
    if any(len(array) != count or array.null_count for array in columns.values()):
        return False
    for setting, index in layout.indices.items():
        starts, data = string_buffers(columns[index])
        lengths = np.diff(starts)
        if lengths.max() > MAX_CAPTION or (setting == "image_key" and not lengths.all()):
            return False
        # The only field of a line, if blank, makes a blank line.
        if layout.width == 1 and (data[starts[:-1]] <= ord(" ")).any() | (data[starts[:-1]] > ord("~")).any():
            return False
    return True


# Rows read strictly, record by record where need be.

_BLOCK_LINES = 1 << 9  # few enough that the garbage collector does not notice them
_MAX_RECORD_LINES = 10_000  # a broken quote is not searched for its end beyond this
_NOT_UTF8 = re.compile("[\udc80-\udcff]")


@dataclass
class RecordReader:
    """Reads the good rows of one file; its counts are complete when the rows are.

    Attributes:
        path: for messages.
        layout: of the file.
        bad: where bad rows are noted.
        taken_literally: rows with broken quotes that were taken as they are written.
    """

    path: Path
    layout: Layout
    bad: BadRows
    taken_literally: int = 0

    def skip_header(self, lines: Lines) -> None:
        """Take the record that names the columns, and blank lines before it."""
        while (read := self._read_record(lines)) and _is_blank(read[1]):
            pass

    def blocks(self, lines: Lines, size: int) -> Iterator[tuple[Sequence[int], list[list[str]]]]:
        """Line numbers (from 1) and fields of the rows, a block at a time.

        Args:
            lines: at the start of a record; taken from, up to the end of one.
            size: lines to read at least, if there are so many.

        Raises: DataError at the first bad row, unless they are left out.
        """
        stop = lines.number + size
        while (left := stop - lines.number) > 0 and (block := lines.take(min(left, _BLOCK_LINES))):
            end = lines.number
            if records := self._parse_block(block):
                yield range(end - len(block) + 1, end + 1), records
                continue
            lines.put_back(block)
            rows = []
            while lines.number < end and (read := self._read_record(lines)):
                rows += self._checked(*read)
            if rows:
                yield [line for line, _ in rows], [record for _, record in rows]

    def report(self) -> None:
        """Say in the log what was read in spite of a fault."""
        if self.taken_literally:
            log.warning(
                "%s: %d rows with broken quotes were read as they are written.", self.path, self.taken_literally
            )

    def _parse_block(self, block: list[str]) -> list[list[str]] | None:
        """The records of the lines, where each line is plainly one good record."""
        text = "".join(block)
        if "\0" in text or max(map(len, block)) > MAX_CAPTION or (not text.isascii() and _NOT_UTF8.search(text)):
            return None
        try:
            records = list(csv.reader(block, delimiter=self.layout.separator, strict=True))
        except csv.Error:
            return None
        if len(records) != len(block) or set(map(len, records)) != {self.layout.width}:
            return None
        image = self.layout.indices["image_key"]
        return records if all(record[image].strip() for record in records) else None

    def _read_record(self, lines: Lines) -> tuple[int, list[str], str] | None:
        """Line, fields and what is wrong with the quotes of the next record; None at the end."""
        start = lines.number + 1
        taken: list[str] = []

        def until_record_ends() -> Iterator[str]:
            while len(taken) < _MAX_RECORD_LINES and (line := lines.take(1)):
                taken.extend(line)
                yield line[0]

        reader = csv.reader(until_record_ends(), delimiter=self.layout.separator, strict=True)
        try:
            record = next(reader, None)
        except csv.Error as error:
            lines.put_back(taken[1:])
            return start, taken[0].rstrip("\r\n").split(self.layout.separator), str(error)
        return None if record is None else (start, record, "")

    def _checked(self, line: int, record: list[str], problem: str) -> list[tuple[int, list[str]]]:
        """The row, or nothing for a blank line and for a bad row that is left out."""
        if _is_blank(record):
            return []
        if fault := self._fault(record):
            self.bad.add(line, *fault)
            return []
        if len(record) == self.layout.width:
            self.taken_literally += bool(problem)
            return [(line, record)]
        if problem and sum(map(len, record)) > MAX_FIELD:
            self.bad.add(line, "field too long", f"a field has more than {MAX_FIELD:,} characters")
            return []
        fields = f"{len(record)} field{'s' * (len(record) != 1)} instead of {self.layout.width}"
        cause = f"broken quotes ({problem}) and {fields}" if problem else fields
        detail = f"{cause}, separated by {describe(self.layout.separator)}"
        fix = 'Quote a field that holds the separator ("…"), set data.separator'
        self.bad.add(line, "broken quotes" if problem else "wrong number of fields", detail, fix)
        return []

    def _fault(self, record: list[str]) -> tuple[str, str, str] | None:
        """Reason, detail and repair where the characters or a value make the row a bad one."""
        text = "".join(record)
        if "\0" in text:
            return "NUL character", "the row holds a NUL character", ""
        if not text.isascii() and (found := _NOT_UTF8.search(text)):
            byte = ord(found[0]) - 0xDC00
            return "not UTF-8", f"the row is not utf-8: it holds the byte {byte:#04x}", "Set data.encoding"
        if len(record) == self.layout.width:
            try:
                for setting, index in self.layout.indices.items():
                    text_of(setting, self.layout.names[setting], record[index])
            except BadValue as error:
                return error.reason, error.detail, ""
        return None


def _is_blank(record: list[str]) -> bool:
    return not record or (len(record) == 1 and not record[0].strip())
