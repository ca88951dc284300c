"""Reader for delimited text (CSV, TSV and similar): encoding, layout and records.

Blocks without a fault are parsed at once by Arrow (`parse_block`). All other blocks are parsed strictly by
`RecordReader`, record by record if necessary. Both return the same rows for text that both can parse.

Quoting follows RFC 4180, except that a quote that is never closed does not swallow the following rows. A record with
broken quotes is read literally if its first line has the right number of fields, and is a bad row otherwise.
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
import pyarrow.compute as pc
from pyarrow import csv as arrow_csv

from clip_exp.config.data import OnBadRow
from clip_exp.data.tables.columns import string_array, string_buffers
from clip_exp.data.tables.lines import Lines, Utf8Blocks, count_lines, find_encoding
from clip_exp.data.tables.reader import (
    IMAGE_SUFFIXES,
    MAX_CAPTION,
    MAX_COLUMN,
    BadRows,
    BadValue,
    RowBlock,
    TableOptions,
    conventional,
    key_of,
    max_length,
    no_column,
    text_of,
    unreadable,
)
from clip_exp.errors import ConfigError, DataError

_SAMPLE_LINES = 50

log = logging.getLogger(__name__)

MAX_FIELD = (
    MAX_COLUMN  # characters, the limit of the csv module; a longer field is most likely a quote that is never closed
)


# Layouts: the separator, whether there is a header, and the positions of the columns.

SEPARATORS = {"\t": "TAB", ",": "comma", ";": "semicolon", "|": "bar"}
_NUMBERED = re.compile(r"\.\w+#\d+$")  # end of an image name in the token files of Flickr8k and Flickr30k
_LONG, _BASE64 = 200, re.compile(r"[A-Za-z0-9+/_=-]+")


@dataclass(frozen=True)
class Layout:
    """Separator, header and positions of the requested columns of a table."""

    separator: str  # one character
    header: bool  # True if the first record has the names of the columns
    width: int  # fields in every record
    indices: dict[str, int]  # maps the setting (`TableOptions.requested`) to the index of its field
    names: dict[str, str]  # maps the setting to the name of its column
    extra: dict[str, int] = field(default_factory=dict)  # maps a column of the filter to the index of its field
    numbered: bool = False  # True if image names end in the number of the caption: `1.jpg#0`

    @property
    def requested(self) -> list[int]:
        """Indices of all fields that are read, ascending."""
        return sorted({*self.indices.values(), *self.extra.values()})


def parse_separator(separator: str) -> str | None:
    """Return the character for `data.separator`; None for `auto`.

    Raises: ConfigError if the value is not one character.
    """
    if separator == "auto":
        return None
    character = {"\\t": "\t", "tab": "\t", "TAB": "\t"}.get(separator, separator)
    if len(character) != 1 or character in '"\r\n\0':
        raise ConfigError(f"data.separator={separator!r} must be auto or one character (TAB is written \\t).")
    return character


def find_layout(path: Path, first_lines: Sequence[str], options: TableOptions, separator: str | None) -> Layout:
    """Detect the layout of a table from its first lines.

    A header is recognized by the requested names. A table without a header is recognized by two columns, one of which
    has image names. `data.header` names the columns of other tables without a header.

    Args:
        path: path of the table, for messages.
        first_lines: first lines of the table, at least one.
        options: requested columns.
        separator: separator, or None to detect it.

    Raises: DataError if a requested column is missing or appears twice. The message has the columns, the nearest name
        and the key to set.
    """
    samples = {candidate: _records(first_lines, candidate) for candidate in ([separator] if separator else SEPARATORS)}
    found = {
        candidate: len(set(conventional(options.requested, _names(records)).values()) & set(_names(records)))
        for candidate, records in samples.items()
    }

    def regularity(records: list[list[str]]) -> float:
        """Return the fraction of the records with the most common number of fields; 0 if that number is one."""
        width, count = Counter(map(len, records)).most_common(1)[0]
        return count / len(records) if width > 1 else 0.0

    if options.header is False or isinstance(options.header, tuple):
        return _of_names(path, samples, options)
    best = max(samples, key=lambda candidate: (found[candidate], regularity(samples[candidate])))
    if found[best] == 0 and options.header is None:
        for candidate, records in samples.items():
            if layout := _without_header(candidate, records, options):
                return layout
        _refuse_data(path, samples[best], best, options)
    return _layout(path, _names(samples[best]), best, options)


def _layout(path: Path, names: list[str], best: str, options: TableOptions, header: bool = True) -> Layout:
    requested, filtered = conventional(options.requested, names), sorted(options.filtered)
    for setting, name in [*requested.items(), *(("filter", name) for name in filtered)]:
        if names.count(name) > 1:
            repair = f"rename one, or set data.{key_of(setting)}" if setting in requested else "rename one"
            raise DataError(f"{path} has {names.count(name)} columns named {name!r}: {repair}.")
        if name not in names:
            raise DataError(f"{path} {_missing(name, setting, names, best)}")
    indices = {setting: names.index(name) for setting, name in requested.items()}
    extra = {name: names.index(name) for name in filtered}
    return Layout(best, header, len(names), indices, requested, extra)


def _of_names(path: Path, samples: dict[str, list[list[str]]], options: TableOptions) -> Layout:
    """Return the layout of a table without a header whose columns are named, or numbered from 0."""

    def regular(separator: str) -> float:
        width = len(options.header) if isinstance(options.header, tuple) else 2
        widths = [len(record) for record in samples[separator]]
        return sum(found == width if isinstance(options.header, tuple) else found >= width for found in widths)

    best = max(samples, key=regular)
    width = Counter(map(len, samples[best])).most_common(1)[0][0]
    if options.header is False:
        names = [str(number) for number in range(width)]
    else:
        assert isinstance(options.header, tuple)
        names = list(options.header)
        if len(names) != width:
            raise DataError(
                f"{path} has {width} columns, separated by {describe(best)}, but data.header=[{','.join(names)}] names {len(names)}: name each of them in order."
            )
    return _layout(path, names, best, options, header=False)


def _records(lines: Sequence[str], separator: str) -> list[list[str]]:
    records: list[list[str]] = []
    with contextlib.suppress(csv.Error):  # a field is over the limit; the records before it are enough
        records.extend(filter(None, csv.reader(lines, delimiter=separator)))
    return records or [[""]]


def _names(records: list[list[str]]) -> list[str]:
    return [name.strip() for name in records[0]]


def _without_header(separator: str, records: list[list[str]], options: TableOptions) -> Layout | None:
    if set(options.requested) != {"image_key", "caption_key"} or options.filtered or len(records[0]) != 2:
        return None
    pairs = [record for record in records if len(record) == 2]
    if pairs and all(_NUMBERED.search(record[0]) for record in pairs):
        return Layout(separator, False, 2, {"image_key": 0, "caption_key": 1}, options.requested, numbered=True)
    counts = [sum(_is_image(record[i]) for record in pairs) for i in (0, 1)]
    image = 0 if counts[0] >= counts[1] else 1
    enough = counts[image] >= 0.9 * len(pairs) and counts[1 - image] < 0.5 * len(pairs)
    if not enough or not _is_image(records[0][image]):
        return None
    return Layout(separator, False, 2, {"image_key": image, "caption_key": 1 - image}, options.requested)


def _is_image(field: str) -> bool:
    return field.strip().lower().endswith(IMAGE_SUFFIXES)


def _refuse_data(path: Path, records: list[list[str]], separator: str, options: TableOptions) -> None:
    """Raise an error for a table whose first record has values instead of the names of columns.

    Raises: DataError that says what to do. It has no value, because values are no names of columns.
    """
    first = records[0]
    encoded = next((i for i, field in enumerate(first) if len(field) > _LONG and _BASE64.fullmatch(field)), None)
    if encoded is not None:
        raise DataError(
            f"{path} has images as base64 text in column {encoded + 1}, as the image tables of Chinese-CLIP (`…_imgs.tsv`): set "
            "data.format=chinese_clip, with the captions in `…_texts.jsonl` next to it."
        )
    images = [i for i, field in enumerate(first) if _is_image(field)]
    if len(first) < 2 or not images:
        return
    names = [f"column{number}" for number in range(len(first))]
    names[images[0]] = options.image_key
    others = [i for i in range(len(first)) if i not in images]
    caption = options.requested.get("caption_key", "title")
    if others:
        names[max(others, key=lambda i: sum(len(record[i]) for record in records if len(record) > i))] = caption
    raise DataError(
        f"{path} has no header row: its first line has values in {len(first)} columns, separated by {describe(separator)}. Name them in "
        f"order: data.header=[{','.join(names)}]."
    )


def _missing(name: str, setting: str, names: list[str], separator: str) -> str:
    message = no_column(name, setting, names)
    if len(names) > 1:
        return message.replace("Its columns:", f"Its columns, separated by {describe(separator)}:")
    other = next((other for other in SEPARATORS if other != separator and other in names[0]), None)
    if other is None:
        between = " If this is more than one column, set data.separator to the character between them."
        return message + between * (name in names[0])
    return f"{message} The separator seems to be {describe(other)}: set data.separator=auto."


def describe(separator: str) -> str:
    """Return a readable name of a separator."""
    return SEPARATORS.get(separator, repr(separator))


# The reader.


class DelimitedReader:
    """`tables.reader.Reader` for delimited text, such as CSV of any common dialect.

    Args:
        path: existing file with columns separated by comma, TAB, semicolon or bar. It has a header with the configured
            names, or two columns without a header. The encoding is UTF-8, UTF-16 or one that can be guessed.
        options: columns and rows to read.
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
                raise DataError(f"{self.path} is empty: it must have a header and one row per image-text pair.")
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
                pass  # skip blank lines before the header
        while block := lines.peek_block():
            if rows := parse_block(block, layout):
                yield _row_block(layout, rows.columns, rows.lines + (lines.number + 1))
                lines.skip(rows.size, rows.line_count)
                continue
            for numbers, records in reader.blocks(lines, count_lines(block)):
                fields = list(zip(*records, strict=True))
                columns = {index: string_array(fields[index]) for index in layout.requested}
                yield _row_block(layout, columns, np.asarray(numbers, dtype=np.int64))
        if reader.taken_literally:
            log.warning("%s: %d rows with broken quotes were read literally.", self.path, reader.taken_literally)


def _row_block(layout: Layout, fields: dict[int, pa.LargeStringArray], lines: np.ndarray) -> RowBlock:
    columns = {setting: fields[index] for setting, index in layout.indices.items()}
    if layout.numbered:
        columns["image_key"] = pc.replace_substring_regex(columns["image_key"], r"#\d+$", "")
    extra = {name: fields[index] for name, index in layout.extra.items()}
    return RowBlock(columns, {"lines": lines}, extra or None)


# Fast path: blocks without a fault.

_QUOTE, _NEWLINE, _RETURN = b'"\n\r'


class FastRows(NamedTuple):
    """Records at the start of a block."""

    columns: dict[int, pa.LargeStringArray]  # by index of the field
    lines: np.ndarray  # int64: line in which each record starts, counted from 0 in the block
    size: int  # bytes of these records
    line_count: int


def parse_block(block: bytes, layout: Layout) -> FastRows | None:
    """Parse the complete records of a block; return None if the strict reader must parse it.

    Args:
        block: UTF-8 text that starts with a record.
        layout: layout of the table.
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
    """Return the newlines of complete records, which of them end a record, and whether fields are quoted."""
    # Arrow drops a byte-order mark at the start of any block.
    if not separator.isascii() or b"\0" in block or block.startswith(b"\xef\xbb\xbf"):
        return None
    data = np.frombuffer(block, dtype=np.uint8)
    newlines = np.flatnonzero(data == _NEWLINE)
    if not len(newlines):
        return None
    if b"\r" in block:  # each must be followed by a newline
        after = np.flatnonzero(data == _RETURN) + 1
        if after[-1] == len(data) or (data[after] != _NEWLINE).any():
            return None
    if b'"' not in block:
        return newlines, np.arange(len(newlines)), False
    quotes = np.flatnonzero(data == _QUOTE)
    before = data[quotes - 1]  # a quote in the first byte is handled by `quotes == 0`
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
    """Return True if each quote opens a field, closes a field, or is one of two quotes in a quoted field."""
    doubled = np.diff(quotes) == 1  # a quote followed by another
    after = data[quotes[1::2] + 1]
    ends_field = (after == ord(separator)) | (after == _NEWLINE) | (after == _RETURN)
    doubled_before = np.concatenate([[False], doubled[1::2]])
    doubled_after = np.concatenate([doubled[1::2], [False]])
    return bool((starts_field[0::2] | doubled_before).all() and (ends_field | doubled_after).all())


def _fields(text: memoryview, layout: Layout, quoting: bool) -> dict[int, pa.LargeStringArray] | None:
    names = {index: str(index) for index in layout.requested}
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
                check_utf8=False,  # the whole block was checked above
                column_types=dict.fromkeys(names.values(), pa.large_string()),
                include_columns=list(names.values()),
                strings_can_be_null=False,
            ),
        )
    except pa.ArrowInvalid:  # a wrong number of fields
        return None
    return {index: table.column(name).combine_chunks() for index, name in names.items()}


def _are_good(columns: dict[int, pa.LargeStringArray], count: int, layout: Layout) -> bool:
    """Return True if there are `count` records, and `RecordReader` would accept all of them."""
    if any(len(array) != count or array.null_count for array in columns.values()):
        return False
    for setting, index in layout.indices.items():
        starts, data = string_buffers(columns[index])
        lengths = np.diff(starts)
        if lengths.max() > max_length(setting) or (setting == "image_key" and not lengths.all()):
            return False
        # If a record has one field, a blank field is a blank line, which is skipped.
        if layout.width == 1 and (data[starts[:-1]] <= ord(" ")).any() | (data[starts[:-1]] > ord("~")).any():
            return False
    return True


# Strict path: record by record if necessary.

_BLOCK_LINES = 1 << 9  # small, so that the garbage collector is not triggered
_MAX_RECORD_LINES = 10_000  # the end of a quoted field is searched in so many lines
_NOT_UTF8 = re.compile("[\udc80-\udcff]")


@dataclass
class RecordReader:
    """Strict reader of the good rows of one file. Its counts are complete after the last row."""

    path: Path  # for messages
    layout: Layout  # layout of the file
    bad: BadRows  # record of the bad rows
    taken_literally: int = 0  # rows with broken quotes that were read literally

    def blocks(self, lines: Lines, size: int) -> Iterator[tuple[Sequence[int], list[list[str]]]]:
        """Yield blocks of rows: line numbers (from 1) and fields.

        Args:
            lines: lines at the start of a record. They are consumed up to the end of a record.
            size: minimum number of lines to read, if available.

        Raises: DataError at the first bad row, unless bad rows are skipped.
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
        """Parse lines each of which is one good record; None otherwise."""
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
        """Return line number, fields and quoting error (or "") of the next record; None at the end."""
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
        """Return the row; an empty list for a blank line or a skipped bad row."""
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
        fix = 'Quote fields that contain the separator ("…"), set data.separator'
        self.bad.add(line, "broken quotes" if problem else "wrong number of fields", detail, fix)
        return []

    def _fault(self, record: list[str]) -> tuple[str, str, str] | None:
        """Return reason, detail and fix for a row with a bad character or value; None for a good row."""
        text = "".join(record)
        if "\0" in text:
            return "NUL character", "the row contains a NUL character", ""
        if not text.isascii() and (found := _NOT_UTF8.search(text)):
            byte = ord(found[0]) - 0xDC00
            return "not UTF-8", f"the row is not UTF-8: it contains the byte {byte:#04x}", "Set data.encoding"
        if len(record) == self.layout.width:
            try:
                for setting, index in self.layout.indices.items():
                    text_of(setting, self.layout.names[setting], record[index])
            except BadValue as error:
                return error.reason, error.detail, ""
        return None


def _is_blank(record: list[str]) -> bool:
    return not record or (len(record) == 1 and not record[0].strip())
