"""The record of pictures that could not be used: who they are, why, and when they are too many."""

import csv
import fcntl
import io
import logging
import os
from collections.abc import Iterable
from pathlib import Path

from clip_exp.data.batches import BadPicture
from clip_exp.errors import DataError

log = logging.getLogger(__name__)

HEADER = ("path", "reason")
VALIDATION = "validation: "


class BadSamples:
    """Distinct bad pictures of one table, appended to a CSV file that all ranks and restarts of a run share.

    Args:
        pictures: distinct pictures of the table.
        max_fraction: of them that may be bad.
        what: for messages, such as `training`.
        mark: what the reasons in the file begin with; it tells the tables of a run apart.
        file: `bad_samples.csv` of the run, or None.
    """

    def __init__(
        self, pictures: int, max_fraction: float, *, what: str, mark: str = "", file: Path | None = None
    ) -> None:
        self.reasons: dict[str, str] = {}
        self._pictures, self._max_fraction = pictures, max_fraction
        self._what, self._mark, self._file = what, mark, file
        self._read_bytes = 0

    def __len__(self) -> int:
        return len(self.reasons)

    def add(self, bad: Iterable[BadPicture]) -> None:
        """Record pictures that were not known to be bad.

        Raises: DataError above the permitted fraction.
        """
        new = {picture.path: picture.reason for picture in bad if picture.path not in self.reasons}
        if not new:
            return
        for path, reason in new.items():
            log.warning("The %s picture %s cannot be read: %s.", self._what, path, reason)
        if self._file is not None:
            try:
                self._append(self._file, new)
            except OSError as error:
                log.warning("%s cannot be written: %s.", self._file, error)
        self.reasons |= new
        self._check()

    def _append(self, file: Path, new: dict[str, str]) -> None:
        with open(file, "a+b") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            stream.seek(self._read_bytes)
            text = stream.read().decode("utf-8", errors="replace")
            self._take_over(text)
            rows: list[tuple[str, str]] = [] if self._read_bytes or text else [HEADER]
            rows += [(path, self._mark + reason) for path, reason in new.items() if path not in self.reasons]
            buffer = io.StringIO()
            csv.writer(buffer, lineterminator="\n").writerows(rows)
            stream.write(buffer.getvalue().encode("utf-8", errors="replace"))
            stream.flush()
            self._read_bytes = stream.seek(0, os.SEEK_END)

    def _take_over(self, text: str) -> None:
        """Records of other ranks and of the run before its restart."""
        for record in csv.reader(io.StringIO(text, newline="")):
            if len(record) == 2 and tuple(record) != HEADER and record[1].startswith(VALIDATION) == bool(self._mark):
                self.reasons.setdefault(record[0], record[1].removeprefix(self._mark))

    def _check(self) -> None:
        if len(self.reasons) <= self._max_fraction * self._pictures:
            return
        path, reason = next(iter(self.reasons.items()))
        raise DataError(
            f"{len(self.reasons)} of {self._pictures} {self._what} pictures cannot be read, more than "
            f"data.max_bad_fraction={self._max_fraction:g}; the first is {path} ({reason}). Repair the data (image_root?), or "
            f"allow more of it to be bad." + (f" All of them: {self._file}." if self._file else "")
        )
