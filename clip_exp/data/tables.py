"""Tables of image-text pairs from CSV files of any common dialect, kept as Arrow arrays that worker processes share.

Captions stay as they are in the file: `null`, `NA`, `007` and the empty caption are text.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TextIO

import numpy as np
import pyarrow as pa

from clip_exp.config.schema import DataConfig
from clip_exp.data.columns import int32_array, int32_numpy, number_by_appearance, string_array
from clip_exp.data.encodings import find_encoding
from clip_exp.data.layouts import Columns, Layout, find_layout, parse_separator
from clip_exp.data.records import RecordReader
from clip_exp.errors import ConfigError, DataError

_SAMPLE_LINES = 50


@dataclass(frozen=True)
class Part:
    """One file of a table: its rows are `start` and the `rows - 1` after it."""

    file: Path
    root: Path  # where its relative image paths start from
    start: int
    rows: int
    skipped: int  # bad rows that were left out


@dataclass(frozen=True)
class PairTable:
    """Rows of pictures with captions, labels or both.

    Attributes:
        paths, captions, labels: Arrow strings, a value per row; captions and labels only where they were asked for.
        lines: int32 [rows]: where each row starts in its file, counted from 1.
        parts: the files, in order.
    """

    paths: pa.LargeStringArray
    captions: pa.LargeStringArray | None
    labels: pa.LargeStringArray | None
    lines: np.ndarray
    parts: tuple[Part, ...]

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def root(self) -> Path:
        """Where the relative image paths of the first file start from."""
        return self.parts[0].root

    @property
    def skipped(self) -> int:
        """Bad rows that were left out."""
        return sum(part.skipped for part in self.parts)

    def part(self, row: int) -> Part:
        """The file that a row comes from."""
        return next(part for part in self.parts if row < part.start + part.rows)

    def path(self, row: int) -> str:
        """The picture's path as it is written in the table."""
        return self.paths[row].as_py()

    def image_path(self, row: int) -> str:
        """The picture's path, below the table's image root where it is relative."""
        return str(self.part(row).root / self.path(row))

    def caption(self, row: int) -> str:
        """The caption, verbatim."""
        if self.captions is None:
            raise ValueError("this table was read without captions")
        return self.captions[row].as_py()

    def label(self, row: int) -> str:
        """The class name, verbatim."""
        if self.labels is None:
            raise ValueError("this table was read without labels")
        return self.labels[row].as_py()

    def where(self, row: int) -> str:
        """File and line of a row, for messages."""
        return f"{self.part(row).file}, line {self.lines[row]}"

    def image_index(self) -> np.ndarray:
        """int32 [rows]: which picture a row shows, numbered by first appearance. Equal paths are the same picture."""
        paths = int32_numpy(self.paths.dictionary_encode().indices)
        if len({part.root for part in self.parts}) == 1:
            return paths
        roots = list(dict.fromkeys(part.root for part in self.parts))
        root = np.repeat([roots.index(part.root) for part in self.parts], [part.rows for part in self.parts])
        return number_by_appearance(root * len(self) + paths)


def read_table(
    tables: str | Path | Sequence[str | Path],
    *,
    image_key: str = "filepath",
    caption_key: str | None = "title",
    label_key: str | None = None,
    image_root: str | Path | None = None,
    separator: str = "auto",
    encoding: str = "auto",
    on_bad_row: str = "error",
    max_rows: int | None = None,
) -> PairTable:
    """One table of all rows of one or several files.

    Args:
        tables: CSV files: separated by comma, TAB, semicolon or bar, with a header that has the keys, or two columns without
            one; in UTF-8, UTF-16 or an encoding that can be guessed.
        image_key, caption_key, label_key: names of the columns; captions and labels are optional.
        image_root: where relative image paths start from; None: each file's own folder.
        separator, encoding: `auto`, or what they are.
        on_bad_row: `error`, or `skip` to leave bad rows out, count them and log how many.
        max_rows: stop after that many rows.

    Raises:
        ConfigError: a file does not exist, or an argument makes no sense.
        DataError: a column is missing, a row is bad, or there are no rows.
    """
    files = [tables] if isinstance(tables, str | Path) else list(tables)
    if not files:
        raise ConfigError("No table was given: set data.train to a CSV file or a list of them.")
    columns, character = Columns(image_key, caption_key, label_key), parse_separator(separator)
    batches: list[pa.RecordBatch] = []
    parts: list[Part] = []
    start = 0
    for file in map(_existing, files):
        room = None if max_rows is None else max_rows - start
        if room == 0:
            break
        reader = _FileReader(file, columns, character, encoding, on_bad_row == "skip")
        part_batches = reader.batches(room)
        rows = sum(batch.num_rows for batch in part_batches)
        root = Path(image_root) if image_root is not None else file.parent
        parts.append(Part(file, root, start, rows, reader.skipped))
        batches += part_batches
        start += rows
    table = pa.Table.from_batches(batches).combine_chunks()
    arrays = {name: table[name].combine_chunks() for name in table.column_names}
    lines = int32_numpy(arrays.pop("line"))
    return PairTable(arrays["image_key"], arrays.get("caption_key"), arrays.get("label_key"), lines, tuple(parts))


def read_configured(
    config: DataConfig, tables: str | Sequence[str], *, label_key: str | None = None, max_rows: int | None = None
) -> PairTable:
    """`read_table` as a run's configuration says."""
    return read_table(
        tables,
        image_key=config.image_key,
        caption_key=config.caption_key,
        label_key=label_key,
        image_root=config.image_root,
        separator=config.separator,
        encoding=config.encoding,
        on_bad_row=config.on_bad_row.value,
        max_rows=max_rows,
    )


def _existing(table: str | Path) -> Path:
    path = Path(table)
    if "://" in str(table):
        raise ConfigError(f"{table} is an address: tables are read from files; download it first.")
    if not path.is_file():
        what = "is not a file" if path.exists() else "does not exist"
        raise ConfigError(
            f"The table {path} {what} (seen from {Path.cwd()}): set data.train or data.val to a CSV file."
        )
    return path


class _FileReader:
    """Reads the wanted columns of one file."""

    def __init__(self, path: Path, columns: Columns, separator: str | None, encoding: str, skip_bad: bool) -> None:
        self.path, self.columns, self.separator, self.skip_bad = path, columns, separator, skip_bad
        self.encoding = find_encoding(path, encoding)
        self.skipped = 0

    def batches(self, max_rows: int | None) -> list[pa.RecordBatch]:
        """At most `max_rows` rows of strings, by key of the configuration, and `line`.

        Raises: DataError, or ConfigError for a file that cannot be read.
        """
        try:
            with open(self.path, encoding=self.encoding, newline="") as file:
                layout = find_layout(self.path, self._first_lines(file), self.columns, self.separator)
                file.seek(0)
                reader = RecordReader(self.path, layout, self.skip_bad)
                batches = list(_batches(reader.blocks(file), layout, max_rows))
        except UnicodeError as error:
            raise DataError(
                f"{self.path} is not {self.encoding}: {error}. Set data.encoding (auto finds most)."
            ) from error
        except OSError as error:
            raise ConfigError(f"The table {self.path} cannot be read: {error.strerror or error}.") from error
        self.skipped = reader.skipped
        if not batches:
            left_out = f" ({self.skipped} bad ones were left out)" if self.skipped else ""
            raise DataError(f"{self.path} has no rows{left_out}: it needs a row per image-text pair below its header.")
        return batches

    def _first_lines(self, file: TextIO) -> list[str]:
        lines = [line for line in islice(file, _SAMPLE_LINES) if line.strip()]
        if not lines:
            raise DataError(f"{self.path} is empty: it needs a header and a row per image-text pair.")
        return lines


def _batches(
    blocks: Iterable[tuple[Sequence[int], list[list[str]]]], layout: Layout, max_rows: int | None
) -> Iterator[pa.RecordBatch]:
    rows = 0
    for lines, records in blocks:
        count = len(records) if max_rows is None else min(len(records), max_rows - rows)
        fields = list(zip(*records[:count], strict=True))
        data = {"line": int32_array(lines[:count])}
        data |= {setting: string_array(fields[index]) for setting, index in layout.indices.items()}
        yield pa.RecordBatch.from_arrays(list(data.values()), list(data))
        rows += count
        if rows == max_rows:
            return
