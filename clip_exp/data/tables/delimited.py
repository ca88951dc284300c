"""Delimited text as blocks of rows: encoding, layout and records put together.

Blocks without a fault are cut and parsed at once (`parse_block`); what is unusual is read strictly, record by record where need be
(`RecordReader`). Where both can read, they give the same rows.

Quoting is RFC 4180's: a quote that is never closed must not swallow the rows after it. A record whose quoting is broken is
taken as it is written where its first line alone has the right number of fields, and is a bad row elsewhere.
"""

import contextlib
import csv
import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from pyarrow import csv as arrow_csv

from clip_exp.config.data import OnBadRow
from clip_exp.data.tables.columns import string_array, string_buffers
from clip_exp.data.tables.lines import Lines, Utf8Blocks, count_lines, find_encoding
from clip_exp.data.tables.reader import (
    MAX_CAPTION,
    BadRows,
    BadValue,
    RowBlock,
    TableOptions,
    no_column,
    text_of,
    unreadable,
)
from clip_exp.errors import ConfigError, DataError

_SAMPLE_LINES = 50

log = logging.getLogger(__name__)

MAX_FIELD = 131_072  # characters, the csv module's own limit: a longer one is most likely a quote that never closes


# Layouts: which character separates the columns, whether there is a header, where the columns are.

SEPARATORS = {"\t": "TAB", ",": "comma", ";": "semicolon", "|": "bar"}
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")


@dataclass(frozen=True)
class Layout:
    """How to cut a table into the columns that are wanted."""

    separator: str  # one character
    header: bool  # whether the first record names the columns
    width: int  # fields in every record
    indices: dict[str, int]  # key of the configuration to the index of its field
    names: dict[str, str]  # of the wanted columns, by key of the configuration
    extra: dict[str, int] = field(default_factory=dict)  # name that the filter uses to the index of its field

    @property
    def wanted(self) -> list[int]:
        """Indices of all fields that are read, ascending."""
        return sorted({*self.indices.values(), *self.extra.values()})


def parse_separator(separator: str) -> str | None:
    """The character that `data.separator` means; None for `auto`.

    Raises: ConfigError for anything but one character.
    """
    if separator == "auto":
        return None
    character = {"\\t": "\t", "tab": "\t", "TAB": "\t"}.get(separator, separator)
    if len(character) != 1 or character in '"\r\n\0':
        raise ConfigError(f"data.separator={separator!r} must be auto or one character (TAB is written \\t).")
    return character


def find_layout(path: Path, first_lines: Sequence[str], options: TableOptions, separator: str | None) -> Layout:
    """The layout of a table from its first lines.

    A header is recognized by the wanted names; a table without one by two columns of which one holds names of images.

    Args:
        path: for messages.
        first_lines: some lines from the start, at least one.
        options: which columns are wanted.
        separator: a character, or None: whichever fits.

    Raises: DataError where a wanted column is missing or there twice, naming the columns, the nearest and the key to set.
    """
    samples = {candidate: _records(first_lines, candidate) for candidate in ([separator] if separator else SEPARATORS)}
    wanted, filtered = options.wanted, sorted(options.filtered)
    found = {candidate: len(set(wanted.values()) & set(_names(records))) for candidate, records in samples.items()}

    def regularity(records: list[list[str]]) -> float:
        """Fraction of the records that have the commonest number of fields, where that is more than one."""
        width, count = Counter(map(len, records)).most_common(1)[0]
        return count / len(records) if width > 1 else 0.0

    best = max(samples, key=lambda candidate: (found[candidate], regularity(samples[candidate])))
    if found[best] == 0:
        for candidate, records in samples.items():
            if layout := _without_header(candidate, records, options):
                return layout
    names = _names(samples[best])
    for setting, name in [*wanted.items(), *(("filter", name) for name in filtered)]:
        if names.count(name) > 1:
            repair = "rename one" if setting == "filter" else f"rename one, or set data.{setting}"
            raise DataError(f"{path} has {names.count(name)} columns called {name!r}: {repair}.")
        if name not in names:
            raise DataError(f"{path} {_missing(name, setting, names, best)}")
    indices = {setting: names.index(name) for setting, name in wanted.items()}
    extra = {name: names.index(name) for name in filtered}
    return Layout(best, True, len(names), indices, wanted, extra)


def _records(lines: Sequence[str], separator: str) -> list[list[str]]:
    records: list[list[str]] = []
    with contextlib.suppress(csv.Error):  # a field over the limit: the records before it are sample enough
        records.extend(filter(None, csv.reader(lines, delimiter=separator)))
    return records or [[""]]


def _names(records: list[list[str]]) -> list[str]:
    return [name.strip() for name in records[0]]


def _without_header(separator: str, records: list[list[str]], options: TableOptions) -> Layout | None:
    if set(options.wanted) != {"image_key", "caption_key"} or options.filtered or len(records[0]) != 2:
        return None
    pairs = [record for record in records if len(record) == 2]
    counts = [sum(record[i].strip().lower().endswith(_IMAGE_SUFFIXES) for record in pairs) for i in (0, 1)]
    image = 0 if counts[0] >= counts[1] else 1
    enough = counts[image] >= 0.9 * len(pairs) and counts[1 - image] < 0.5 * len(pairs)
    if not enough or not records[0][image].strip().lower().endswith(_IMAGE_SUFFIXES):
        return None
    return Layout(separator, False, 2, {"image_key": image, "caption_key": 1 - image}, options.wanted)


def _missing(name: str, setting: str, names: list[str], separator: str) -> str:
    message = no_column(name, setting, names)
    if len(names) > 1:
        return message.replace("Its columns:", f"Its columns, separated by {describe(separator)}:")
    other = next((other for other in SEPARATORS if other != separator and other in names[0]), None)
    if other is None:
        between = " If that is more than one column, set data.separator to the character between them."
        return message + between * (name in names[0])
    return f"{message} The table looks separated by {describe(other)}: set data.separator=auto."


def describe(separator: str) -> str:
    """A separator in words."""
    return SEPARATORS.get(separator, repr(separator))


# The reader: encoding, layout and records put together.


class DelimitedReader:
    """A `tables.reader.Reader` of text whose columns a character separates: CSV of any common dialect.

    Args:
        path: an existing file: separated by comma, TAB, semicolon or bar, with a header that has the keys, or two columns
            without one; in UTF-8, UTF-16 or an encoding that can be guessed.
        options: what to read.
    """

    def __init__(self, path: Path, options: TableOptions) -> None:
        self.path = path
        self.options = options
        self.separator = parse_separator(options.separator)
        self.bad = BadRows(path, options.on_bad_row is OnBadRow.skip)
        self.bytes_read = 0

    def blocks(self) -> Iterator[RowBlock]:
        """See `tables.reader.Reader`."""
        try:
            source = Utf8Blocks(self.path, find_encoding(self.path, self.options.encoding))
            lines = Lines(source)
            first = lines.take(_SAMPLE_LINES)
            lines.put_back(first)
            first = [line for line in first if line.strip()]
            if not first:
                raise DataError(f"{self.path} is empty: it needs a header and a row per image-text pair.")
            layout = find_layout(self.path, first, self.options, self.separator)
            for block in self._read(lines, layout):
                self.bytes_read = source.bytes_read
                yield block
        except OSError as error:
            raise unreadable(self.path, error) from error

    def _read(self, lines: Lines, layout: Layout) -> Iterator[RowBlock]:
        reader = RecordReader(self.path, layout, self.bad)
        if layout.header:
            while (read := reader.read_record(lines)) and _is_blank(read[1]):
                pass  # blank lines before the record that names the columns
        while block := lines.peek_block():
            if rows := parse_block(block, layout):
                yield _row_block(layout, rows.columns, rows.lines + (lines.number + 1))
                lines.skip(rows.size, rows.line_count)
                continue
            for numbers, records in reader.blocks(lines, count_lines(block)):
                fields = list(zip(*records, strict=True))
                columns = {index: string_array(fields[index]) for index in layout.wanted}
                yield _row_block(layout, columns, np.asarray(numbers, dtype=np.int64))
        if reader.taken_literally:
            log.warning(
                "%s: %d rows with broken quotes were read as they are written.", self.path, reader.taken_literally
            )


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


def parse_block(block: bytes, layout: Layout) -> FastRows | None:
    """The whole records of a block that starts with one; None if anything is unusual, and the strict reader must look.

    Args:
        block: UTF-8.
        layout: of the table.
    """
    if (cut := _cut(block, layout.separator)) is None:
        return None
    newlines, last, quoting = cut
    ends = newlines[last]
    lengths = np.diff(ends, prepend=-1)
    size = int(ends[-1]) + 1
    text = memoryview(block)[:size]
    if lengths.max() > MAX_FIELD:
        return None
    try:
        str(text, "utf-8")
    except UnicodeDecodeError:
        return None
    columns = _fields(text, layout, quoting)
    if columns is None or not _are_good(columns, len(ends), layout):
        return None
    lines = np.concatenate([[0], last[:-1] + 1])
    return FastRows(columns, lines, size, len(newlines))


def _cut(block: bytes, separator: str) -> tuple[np.ndarray, np.ndarray, bool] | None:
    """The newlines of a block up to its last record's end, which of them end records, and whether quotes mean anything."""
    if not separator.isascii() or b"\0" in block or block.startswith(b"\xef\xbb\xbf"):  # Arrow drops a mark anywhere
        return None
    data = np.frombuffer(block, dtype=np.uint8)
    newlines = np.flatnonzero(data == _NEWLINE)
    if not len(newlines):
        return None
    if b"\r" in block:  # each must have a newline after it
        after = np.flatnonzero(data == _RETURN) + 1
        if after[-1] == len(data) or (data[after] != _NEWLINE).any():
            return None
    if b'"' not in block:
        return newlines, np.arange(len(newlines)), False
    quotes = np.flatnonzero(data == _QUOTE)
    before = data[quotes - 1]  # of the first byte: the last, whatever it is
    starts_field = (before == ord(separator)) | (before == _NEWLINE) | (quotes == 0)  # outside quotes
    if not starts_field.any():
        return newlines, np.arange(len(newlines)), False
    ends = np.flatnonzero(np.searchsorted(quotes, newlines) % 2 == 0)
    if not len(ends):
        return None
    newlines = newlines[: ends[-1] + 1]
    inside = quotes < newlines[-1]
    good = _are_balanced(data, quotes[inside], starts_field[inside], separator)
    return (newlines, ends, True) if good else None


def _are_balanced(data: np.ndarray, quotes: np.ndarray, starts_field: np.ndarray, separator: str) -> bool:
    """Whether each quote opens a field at its start, closes it at its end, or is one of two in a quoted field."""
    doubled = np.diff(quotes) == 1  # a quote and the next
    after = data[quotes[1::2] + 1]
    ends_field = (after == ord(separator)) | (after == _NEWLINE) | (after == _RETURN)
    doubled_before = np.concatenate([[False], doubled[1::2]])
    doubled_after = np.concatenate([doubled[1::2], [False]])
    return bool((starts_field[0::2] | doubled_before).all() and (ends_field | doubled_after).all())


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
    """Reads the good rows of one file; its counts are complete when the rows are."""

    path: Path  # for messages
    layout: Layout  # of the file
    bad: BadRows  # where bad rows are noted
    taken_literally: int = 0  # rows with broken quotes that were taken as they are written

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
            while lines.number < end and (read := self.read_record(lines)):
                rows += self._checked(*read)
            if rows:
                yield [line for line, _ in rows], [record for _, record in rows]

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

    def read_record(self, lines: Lines) -> tuple[int, list[str], str] | None:
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
