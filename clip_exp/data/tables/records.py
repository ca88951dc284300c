"""The rows of a delimited file, read strictly, record by record where need be.

Quoting is RFC 4180's: a quote that is never closed must not swallow the rows after it. A record whose quoting is broken is
taken as it is written where its first line alone has the right number of fields, and is a bad row elsewhere.
"""

import csv
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from clip_exp.data.tables.layouts import Layout, describe
from clip_exp.data.tables.lines import Lines
from clip_exp.data.tables.reader import MAX_CAPTION, BadRows
from clip_exp.data.tables.values import BadValue, text_of

log = logging.getLogger(__name__)

MAX_FIELD = 131_072  # characters, the csv module's own limit: a longer one is most likely a quote that never closes
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
