"""Delimited text as blocks of rows: encoding, layout and records put together."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TextIO

import numpy as np

from clip_exp.config.schema import OnBadRow
from clip_exp.data.tables.columns import string_array
from clip_exp.data.tables.encodings import find_encoding
from clip_exp.data.tables.layouts import Columns, find_layout, parse_separator
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
        self.columns = Columns(options.image_key, options.caption_key, options.label_key)
        self.separator = parse_separator(options.separator)
        self.encoding = find_encoding(path, options.encoding)
        self.bad = BadRows(path, options.on_bad_row is OnBadRow.skip)

    def blocks(self) -> Iterator[RowBlock]:
        """See `tables.reader.Reader`."""
        try:
            with open(self.path, encoding=self.encoding, newline="") as file:
                layout = find_layout(self.path, self._first_lines(file), self.columns, self.separator)
                file.seek(0)
                reader = RecordReader(self.path, layout, self.bad)
                for lines, records in reader.blocks(file):
                    fields = list(zip(*records, strict=True))
                    columns = {setting: string_array(fields[index]) for setting, index in layout.indices.items()}
                    yield RowBlock(columns, np.asarray(lines, dtype=np.int64))
        except UnicodeError as error:
            raise DataError(
                f"{self.path} is not {self.encoding}: {error}. Set data.encoding (auto finds most)."
            ) from error
        except OSError as error:
            raise ConfigError(f"The table {self.path} cannot be read: {error.strerror or error}.") from error

    def _first_lines(self, file: TextIO) -> list[str]:
        lines = [line for line in islice(file, _SAMPLE_LINES) if line.strip()]
        if not lines:
            raise DataError(f"{self.path} is empty: it needs a header and a row per image-text pair.")
        return lines
