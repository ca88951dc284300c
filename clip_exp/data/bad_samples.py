"""The record of images that could not be used: who they are, why, and when they are too many."""

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
LOGGED_SINGLY = 10  # bad images; after those the log has a line at 100, 1,000, …


class BadSamples:
    """Distinct bad images, appended to a CSV file that all ranks and restarts of a run share.

    Args:
        images: distinct images that there are.
        max_fraction: of them that may be bad.
        what: for messages, such as `training`.
        mark: what the reasons in the file begin with; it tells the tables of a run apart.
        file: `bad_samples.csv` of the run, or None.

    Attributes:
        reasons: name of each bad image to why it is one.
    """

    def __init__(
        self, images: int, max_fraction: float, *, what: str, mark: str = "", file: Path | None = None
    ) -> None:
        self.reasons: dict[str, str] = {}
        self._images, self._max_fraction = images, max_fraction
        self._what, self._mark, self._file = what, mark, file
        self._read_bytes = 0
        if file is not None and file.is_file():
            with self._shared(), _alone(file), open(file, "rb") as stream:
                self._take_over(stream)

    def __len__(self) -> int:
        return len(self.reasons)

    def kinds(self) -> Counter[str]:
        """How many there are by the kind of their reason."""
        return Counter(map(kind_of, self.reasons.values()))

    def add(self, bad: Iterable[UnreadableImage]) -> None:
        """Record images that were not known to be bad.

        Raises: DataError above the permitted fraction.
        """
        # A name that the file gives back: no half of a surrogate pair.
        named = {image.path.encode("utf-8", errors="backslashreplace").decode(): image.reason for image in bad}
        new = {path: reason for path, reason in named.items() if path not in self.reasons}
        if not new:
            return
        with self._shared():
            self._append(new)
        before = len(self.reasons)
        self.reasons |= new
        self._tell(new, before)
        if len(self.reasons) > self._max_fraction * self._images:
            path, reason = next(iter(self.reasons.items()))
            listed = f" All of them are in {self._file}; remove it when they are repaired." if self._file else ""
            raise DataError(
                f"{len(self.reasons)} of {self._images} {self._what} images cannot be read, more than "
                f"data.max_bad_fraction={self._max_fraction:g}; the first is {path} ({reason}). Repair the data (image_root?), or "
                f"allow more of it to be bad.{listed}"
            )

    def _tell(self, new: dict[str, str], before: int) -> None:
        for path, reason in list(new.items())[: max(0, LOGGED_SINGLY - before)]:
            log.warning("The %s image %r cannot be read: %s.", self._what, path, reason)
        if before < LOGGED_SINGLY <= len(self):
            log.warning("Further bad images are counted%s.", f" and listed in {self._file}" if self._file else "")
        reached = 10 ** (len(str(len(self))) - 1)
        if before < reached <= len(self) and reached > LOGGED_SINGLY:
            kinds = ", ".join(f"{count:,} {kind}" for kind, count in self.kinds().most_common())
            log.warning("%s %s images cannot be read so far: %s.", f"{len(self):,}", self._what, kinds)

    @contextmanager
    def _shared(self) -> Iterator[None]:
        """Where the file cannot be used, the record goes on without it: training does not end for the sake of a list."""
        try:
            yield
        except OSError as error:
            log.warning("Bad images are not listed: %s cannot be used (%s).", self._file, error.strerror or error)
            self._file = None

    def _append(self, new: dict[str, str]) -> None:
        if self._file is None:
            return
        with _alone(self._file), open(self._file, "a+b") as stream:
            self._take_over(stream)
            rows: list[tuple[str, str]] = [] if self._read_bytes else [HEADER]
            rows += [(path, self._mark + reason) for path, reason in new.items() if path not in self.reasons]
            buffer = io.StringIO()
            TextWriter(buffer).writerows(rows)
            if self._read_bytes:
                stream.seek(self._read_bytes - 1)
                if stream.read(1) != b"\n":  # a process was killed while it wrote the last line
                    stream.write(b"\n")
            stream.write(buffer.getvalue().encode("utf-8", errors="backslashreplace"))
            stream.flush()
            self._read_bytes = stream.seek(0, os.SEEK_END)

    def _take_over(self, stream: BinaryIO) -> None:
        """Records that were added since the last time: of other ranks, and of the run before its restart."""
        stream.seek(self._read_bytes)
        text = stream.read().decode("utf-8", errors="replace")
        self._read_bytes = stream.tell()
        for record in csv.reader(io.StringIO(text, newline="")):
            if len(record) == 2 and tuple(record) != HEADER and record[1].startswith(VALIDATION) == bool(self._mark):
                self.reasons.setdefault(original(record[0]), record[1].removeprefix(self._mark))


def _alone(file: Path) -> AbstractContextManager[bool]:
    """Let no other rank read or write the file, which takes them a moment. Without locks some images may be listed twice."""
    return lock(file.with_name(f".{file.name}.lock"), wait_s=math.inf, remove=True)
