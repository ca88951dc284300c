"""The rows of a delimited file, read strictly and fast.

Quoting is RFC 4180's: a quote that is never closed must not swallow the rows after it. A record whose quoting is broken is
taken as it is written where its first line alone has the right number of fields, and is a bad row elsewhere. Blocks of lines
that hold one good record each, which is nearly all of a usual file, are parsed at once; the others record by record.
"""

import csv
import logging
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TextIO

from clip_exp.data.tables.layouts import Layout, describe
from clip_exp.data.tables.reader import BadRows

log = logging.getLogger(__name__)

_BLOCK_LINES = 1 << 9  # few enough that the garbage collector does not notice them
_MAX_RECORD_LINES = 10_000  # a broken quote is not searched for its end beyond this


class Lines:
    """The lines of a file with their numbers; they can be put back."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._put_back: deque[str] = deque()
        self.number = 0  # lines that were taken

    def take(self, count: int) -> list[str]:
        """The next `count` lines, or as many as there are."""
        lines = [self._put_back.popleft() for _ in range(min(count, len(self._put_back)))]
        lines += islice(self._file, count - len(lines))
        self.number += len(lines)
        return lines

    def put_back(self, lines: Sequence[str]) -> None:
        """Give back the lines that were taken last."""
        self._put_back.extendleft(reversed(lines))
        self.number -= len(lines)


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

    def blocks(self, file: TextIO) -> Iterator[tuple[Sequence[int], list[list[str]]]]:
        """Line numbers (from 1) and fields of the rows, a block at a time.

        Args:
            file: opened with newline="", at its start.

        Raises: DataError at the first bad row, unless they are left out.
        """
        lines = Lines(file)
        if self.layout.header:
            self._skip_header(lines)
        while block := lines.take(_BLOCK_LINES):
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
        self._report()

    def _skip_header(self, lines: Lines) -> None:
        while (read := self._read_record(lines)) and _is_blank(read[1]):
            pass

    def _parse_block(self, block: list[str]) -> list[list[str]] | None:
        """The records of the lines, where each line is one good record."""
        try:
            records = list(csv.reader(block, delimiter=self.layout.separator, strict=True))
        except csv.Error:
            return None
        return records if len(records) == len(block) and set(map(len, records)) == {self.layout.width} else None

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
        if len(record) == self.layout.width:
            self.taken_literally += bool(problem)
            return [(line, record)]
        fields = f"{len(record)} field{'s' * (len(record) != 1)} instead of {self.layout.width}"
        cause = f"broken quotes ({problem}) and {fields}" if problem else fields
        detail = f"{cause}, separated by {describe(self.layout.separator)}"
        fix = 'Quote a field that holds the separator ("…"), set data.separator'
        self.bad.add(line, "broken quotes" if problem else "wrong number of fields", detail, fix)
        return []

    def _report(self) -> None:
        if self.taken_literally:
            log.warning(
                "%s: %d rows with broken quotes were read as they are written.", self.path, self.taken_literally
            )


def _is_blank(record: list[str]) -> bool:
    return not record or (len(record) == 1 and not record[0].strip())
