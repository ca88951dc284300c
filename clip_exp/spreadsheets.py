"""CSV files that hold third-party text: a spreadsheet would compute a cell that begins like a formula.

Such a cell gets an apostrophe in front, by which spreadsheets know text. So does one that begins with apostrophes and then like a
formula: what is read back is then always what was written.
"""

import csv
import re
from collections.abc import Iterable
from typing import IO, Any

FORMULA = re.compile(r"'*[=+\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")  # the last four are the full-width forms of = + - @


class TextWriter:
    """A CSV writer whose texts stay texts; numbers are written as they are."""

    def __init__(self, file: IO[str]) -> None:
        self._writer = csv.writer(file, lineterminator="\n")
        self._quoting = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_ALL)

    def writerow(self, row: Iterable[Any]) -> None:
        cells = [as_text(cell) for cell in row]
        # The csv module does not quote a carriage return, which would begin a row, and with it a cell.
        odd = any(isinstance(cell, str) and "\r" in cell for cell in cells)
        (self._quoting if odd else self._writer).writerow(cells)

    def writerows(self, rows: Iterable[Iterable[Any]]) -> None:
        for row in rows:
            self.writerow(row)


def as_text(cell: Any) -> Any:
    """Return a cell that a spreadsheet shows as it is."""
    return f"'{cell}" if isinstance(cell, str) and FORMULA.match(cell) else cell


def original(cell: str) -> str:
    """Return what `as_text` was given."""
    return cell[1:] if cell.startswith("'") and FORMULA.match(cell) else cell
