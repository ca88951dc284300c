"""Record of the images that could not be used, with the reason for each, and the error raised when there are too many."""

import csv
import io
import logging
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import BinaryIO

from clip_exp.data.files import kind_of
from clip_exp.data.loader import UnreadableImage
from clip_exp.errors import DataError
from clip_exp.storage import TextWriter, lock, original

log = logging.getLogger(__name__)

HEADER = ("path", "reason")
VALIDATION = "validation: "
LOGGED_SINGLY = 10  # so many bad images are logged one by one; after that, one line is logged at 100, 1,000, …


class BadSamples:
    """Record of distinct bad images, appended to a CSV file that all ranks and restarts of a run share.

    Args:
        images: number of distinct images in the data.
        max_fraction: largest allowed fraction of bad images.
        what: name of the data for messages, such as `training`.
        mark: prefix of the reasons in the file, which separates training from validation images.
        file: `bad_samples.csv` of the run; None: write no file.

    Attributes:
        reasons: maps the name of each bad image to the reason.
    """

    def __init__(
        self, images: int, max_fraction: float, *, what: str, mark: str = "", file: Path | None = None
    ) -> None:
        self.reasons: dict[str, str] = {}
        self._images, self._max_fraction = images, max_fraction
        self._what, self._mark, self._file = what, mark, file
        self._read_bytes = 0
        if file is not None and file.is_file():
            with self._without_file_on_error(), _locked(file), open(file, "rb") as stream:
                self._read_new(stream)

    def __len__(self) -> int:
        return len(self.reasons)

    def kinds(self) -> Counter[str]:
        """Return the number of bad images by the kind of their reason."""
        return Counter(map(kind_of, self.reasons.values()))

    def add(self, bad: Iterable[UnreadableImage]) -> None:
        """Record bad images that are not recorded yet.

        Raises: DataError if the fraction of bad images exceeds `max_fraction`.
        """
        # UTF-8 cannot encode a lone surrogate. Replace it here, so that names are equal when they are read back from
        # the file.
        named = {image.path.encode("utf-8", errors="backslashreplace").decode(): image.reason for image in bad}
        new = {path: reason for path, reason in named.items() if path not in self.reasons}
        if not new:
            return
        with self._without_file_on_error():
            self._append(new)
        before = len(self.reasons)
        self.reasons |= new
        self._log(new, before)
        if len(self.reasons) > self._max_fraction * self._images:
            path, reason = next(iter(self.reasons.items()))
            listed = f" All are listed in {self._file}; remove that file when they are repaired." if self._file else ""
            raise DataError(
                f"{len(self.reasons)} of {self._images} {self._what} images cannot be read, more than "
                f"data.max_bad_fraction={self._max_fraction:g}; the first is {path} ({reason}). Check data.image_root, repair the "
                f"images, or increase data.max_bad_fraction.{listed}"
            )

    def _log(self, new: dict[str, str], before: int) -> None:
        for path, reason in list(new.items())[: max(0, LOGGED_SINGLY - before)]:
            log.warning("The %s image %r cannot be read: %s.", self._what, path, reason)
        if before < LOGGED_SINGLY <= len(self):
            log.warning("More bad images are only counted%s.", f" and listed in {self._file}" if self._file else "")
        reached = 10 ** (len(str(len(self))) - 1)
        if before < reached <= len(self) and reached > LOGGED_SINGLY:
            kinds = ", ".join(f"{count:,} {kind}" for kind, count in self.kinds().most_common())
            log.warning("%s %s images cannot be read so far: %s.", f"{len(self):,}", self._what, kinds)

    @contextmanager
    def _without_file_on_error(self) -> Iterator[None]:
        """Continue without the file if it cannot be read or written: training should not fail because of a list."""
        try:
            yield
        except OSError as error:
            log.warning("Bad images are not listed: cannot access %s (%s).", self._file, error.strerror or error)
            self._file = None

    def _append(self, new: dict[str, str]) -> None:
        if self._file is None:
            return
        with _locked(self._file), open(self._file, "a+b") as stream:
            self._read_new(stream)
            rows: list[tuple[str, str]] = [] if self._read_bytes else [HEADER]
            rows += [(path, self._mark + reason) for path, reason in new.items() if path not in self.reasons]
            buffer = io.StringIO()
            TextWriter(buffer).writerows(rows)
            if self._read_bytes:
                stream.seek(self._read_bytes - 1)
                # A process may have been killed while it wrote the last line.
                if stream.read(1) != b"\n":
                    stream.write(b"\n")
            stream.write(buffer.getvalue().encode("utf-8", errors="backslashreplace"))
            stream.flush()
            self._read_bytes = stream.seek(0, os.SEEK_END)

    def _read_new(self, stream: BinaryIO) -> None:
        """Read the records added since the last call, by other ranks or by the run before a restart."""
        stream.seek(self._read_bytes)
        text = stream.read().decode("utf-8", errors="replace")
        self._read_bytes = stream.tell()
        for record in csv.reader(io.StringIO(text, newline="")):
            if len(record) == 2 and tuple(record) != HEADER and record[1].startswith(VALIDATION) == bool(self._mark):
                self.reasons.setdefault(original(record[0]), record[1].removeprefix(self._mark))


def _locked(file: Path) -> AbstractContextManager[bool]:
    """Lock the file against other ranks. On file systems without locks, some images may be listed twice."""
    return lock(file.with_name(f".{file.name}.lock"), wait_s=math.inf, remove=True)
