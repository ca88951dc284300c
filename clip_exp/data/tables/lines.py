"""Text files as blocks of UTF-8 bytes and as numbered lines, and detection of their encoding."""

import codecs
import io
import logging
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

from clip_exp.errors import ConfigError, DataError

log = logging.getLogger(__name__)


_BLOCK = 1 << 19  # bytes; small, because one broken row makes the whole block be read the slow way
_MAX_LINE = 16 << 20  # bytes; a file with a longer line is not a table


class Utf8Blocks:
    """Iterator over a file's text in UTF-8. Each block ends at the end of a line.

    UTF-8 files are returned without a check, so that the reader can report invalid bytes by row. Other encodings are
    decoded strictly. A byte-order mark is removed.

    Args:
        path: existing file.
        encoding: result of `find_encoding`.

    Attributes:
        bytes_read: number of bytes of the file read so far.
    """

    def __init__(self, path: Path, encoding: str) -> None:
        self.path, self.encoding = path, encoding
        self.bytes_read = 0
        self._lines = 0
        self._blocks = self._cut()

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        """Return the next block.

        Raises: DataError for bytes that are invalid in the encoding, and for a line that is too long.
        """
        return next(self._blocks)

    def _cut(self) -> Iterator[bytes]:
        rest = b""
        for text in self._as_is() if self.encoding in UTF_8 else self._decoded():
            end = text.rfind(b"\n") + 1 or text.rfind(b"\r", 0, -1) + 1  # a final \r may be the first half of \r\n
            if end:
                yield rest + text[:end]
                self._lines += text.count(b"\n", 0, end)
            rest = text[end:] if end else rest + text
            if len(rest) > _MAX_LINE:
                raise DataError(
                    f"{self.path}, line {self._lines + 1} is longer than {_MAX_LINE >> 20} MB: the file is not a text table."
                )
        if rest:
            yield rest

    def _read(self) -> Iterator[bytes]:
        with open(self.path, "rb") as file:
            while block := file.read(_BLOCK):
                self.bytes_read += len(block)
                yield block

    def _as_is(self) -> Iterator[bytes]:
        mark = codecs.BOM_UTF8
        for block in self._read():
            yield block.removeprefix(mark)
            mark = b""

    def _decoded(self) -> Iterator[bytes]:
        decoder = codecs.getincrementaldecoder(self.encoding)()
        try:
            for block in self._read():
                yield decoder.decode(block).encode("utf-8")
            yield decoder.decode(b"", final=True).encode("utf-8")
        except UnicodeDecodeError as error:
            offset = self.bytes_read - len(error.object) + error.start
            # Count the lines between the start of this block and the invalid byte.
            line = 1 + self._lines + error.object[: error.start].decode(self.encoding, "ignore").count("\n")
            raise DataError(
                f"{self.path}, about line {line}: byte {error.object[error.start]:#04x} at offset {offset:,} is not valid "
                f"{self.encoding} ({error.reason}). Set data.encoding (auto detects most encodings), or repair the file."
            ) from error
        except UnicodeError as error:
            raise DataError(
                f"{self.path} is not valid {self.encoding}: {error}. Set data.encoding (auto detects most encodings)."
            ) from error


def count_lines(block: bytes) -> int:
    """Return the number of lines of a text. An unfinished line at the end counts only if it is the only one."""
    return max(1, block.count(b"\n") + block.count(b"\r") - block.count(b"\r\n"))


class Lines:
    """Stream of numbered lines, which can be put back or consumed as bytes.

    Invalid UTF-8 bytes become lone surrogates (`surrogateescape`).

    Args:
        blocks: blocks of UTF-8, each of which ends at the end of a line.

    Attributes:
        number: number of lines consumed so far.
    """

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self.number = 0
        self._blocks = blocks
        self._lines: deque[str] = deque()  # next lines
        self._bytes = b""  # bytes that follow them

    def take(self, count: int) -> list[str]:
        """Consume and return the next `count` lines, or fewer at the end."""
        lines: list[str] = []
        while len(lines) < count and (self._lines or self._decode()):
            lines += [self._lines.popleft() for _ in range(min(count - len(lines), len(self._lines)))]
        self.number += len(lines)
        return lines

    def put_back(self, lines: Sequence[str]) -> None:
        """Put back the lines that were taken last."""
        self._lines.extendleft(reversed(lines))
        self.number -= len(lines)

    def peek_block(self) -> bytes:
        """Return the next bytes without consuming them, at least one block unless the text ends."""
        first = "".join(self._lines).encode("utf-8", "surrogateescape")
        self._lines.clear()
        self._bytes = b"".join([first, self._bytes, next(self._blocks, b"")])
        return self._bytes

    def skip(self, size: int, lines: int) -> None:
        """Consume the first `size` bytes of `peek_block`, which are `lines` lines."""
        self._bytes = self._bytes[size:]
        self.number += lines

    def _decode(self) -> bool:
        text = self._bytes or next(self._blocks, b"")
        self._bytes = b""
        self._lines.extend(io.StringIO(text.decode("utf-8", "surrogateescape"), newline=""))
        return bool(text)


# Detection of the encoding.

UTF_8 = ("utf-8", "utf-8-sig")

_SCAN_BLOCK = 1 << 20
_SAMPLE = 1 << 16
_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, because it starts with the mark of UTF-16
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def find_encoding(path: Path, encoding: str = "auto") -> str:
    """Return the name of the codec of a text file.

    Args:
        path: existing file.
        encoding: name of a codec, or `auto`: the byte-order mark, else UTF-8 if most non-ASCII lines are UTF-8, else a
            guess that is logged as a warning.

    Raises: ConfigError for an unknown codec, DataError if no encoding fits.
    """
    if encoding != "auto":
        try:
            "".encode(encoding)  # raises for codecs that are not text encodings, such as base64
            return codecs.lookup(encoding).name
        except (LookupError, UnicodeError, ValueError) as error:
            raise ConfigError(
                f"data.encoding={encoding} is not an encoding of Python: use a name such as cp1252, or auto."
            ) from error
    with open(path, "rb") as file:
        head = file.read(_SAMPLE)
    for mark, name in _MARKS.items():
        if head.startswith(mark):
            return name
    # UTF-16 without a byte-order mark: every other byte of mostly Latin text is zero. UTF-8 text has no zero bytes.
    even, odd = head[0::2].count(0), head[1::2].count(0)
    if max(even, odd) * 8 > len(head):
        return "utf-16-le" if odd > even else "utf-16-be"
    if _is_utf8(path):
        return "utf-8"
    lines, size = [], 0  # the first non-ASCII lines; only these differ between encodings
    with open(path, "rb") as file:
        while size < _SAMPLE and (line := file.readline(_SAMPLE)):
            if not line.isascii():
                lines.append(line)
                size += len(line)
    utf8 = sum(line.decode("utf-8", "ignore").encode() == line for line in lines)
    if utf8 > len(lines) / 2:
        return "utf-8"  # with some bad rows: lines in another encoding are hardly ever valid UTF-8 by chance
    return _guess(path, b"".join(lines))


def _is_utf8(path: Path) -> bool:
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        with open(path, "rb") as file:
            while block := file.read(_SCAN_BLOCK):
                decoder.decode(block)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return True


def _guess(path: Path, sample: bytes) -> str:
    from charset_normalizer import from_bytes

    matches = from_bytes(sample)
    best = matches.best()
    if best is None:
        raise DataError(
            f"{path} is not UTF-8 and its encoding could not be detected: set data.encoding (cp1252, gb18030, utf-16-le, …)."
        )
    as_good = [match for match in matches if (match.chaos, match.coherence) == (best.chaos, best.coherence)]
    # Prefer cp1252, the most common encoding, if it is among the equally good ones.
    western = any("cp1252" in match.could_be_from_charset for match in as_good)
    encoding = "cp1252" if western else best.encoding
    log.warning("%s is not UTF-8; reading it as %s. Set data.encoding if the captions look wrong.", path, encoding)
    return encoding
