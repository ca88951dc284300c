"""Delimited text as blocks of rows: encoding, layout and records put together."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from clip_exp.config.data_schema import OnBadRow
from clip_exp.data.tables.columns import string_array
from clip_exp.data.tables.encodings import find_encoding
from clip_exp.data.tables.fast import parse_block
from clip_exp.data.tables.layouts import Columns, Layout, find_layout, parse_separator
from clip_exp.data.tables.lines import Lines, Utf8Blocks, count_lines
from clip_exp.data.tables.options import TableOptions
from clip_exp.data.tables.reader import BadRows, RowBlock
from clip_exp.data.tables.records import RecordReader
from clip_exp.errors import ConfigError, DataError

_SAMPLE_LINES = 50


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
