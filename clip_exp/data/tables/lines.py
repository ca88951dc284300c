"""The text of a file as UTF-8, a block of bytes at a time, and as lines with their numbers; which encoding it is in."""

import codecs
import io
import logging
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

from clip_exp.errors import ConfigError, DataError

log = logging.getLogger(__name__)


_BLOCK = 1 << 19  # bytes: one broken row makes this much text be read the slow way
_MAX_LINE = 16 << 20  # bytes; without a line's end for so long it is no table


class Utf8Blocks:
    """An iterator over a file's text in UTF-8. Each block ends where a line does.

    Text in UTF-8 comes as it is, with whatever does not belong there; other encodings are decoded strictly. A byte-order mark
    is left out.

    Args:
        path: an existing file.
        encoding: as `find_encoding` says.

    Attributes:
        bytes_read: of the file, so far.
    """

    def __init__(self, path: Path, encoding: str) -> None:
        self.path, self.encoding = path, encoding
        self.bytes_read = 0
        self._lines = 0
        self._blocks = self._cut()

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        """Raises: DataError for bytes that are not in the encoding, and for a line without end."""
        return next(self._blocks)

    def _cut(self) -> Iterator[bytes]:
        rest = b""
        for text in self._as_is() if self.encoding in UTF_8 else self._decoded():
            end = text.rfind(b"\n") + 1 or text.rfind(b"\r", 0, -1) + 1  # the last \r may be half of a line's end
            if end:
                yield rest + text[:end]
                self._lines += text.count(b"\n", 0, end)
            rest = text[end:] if end else rest + text
            if len(rest) > _MAX_LINE:
                raise DataError(
                    f"{self.path}, line {self._lines + 1}: it does not end within {_MAX_LINE >> 20} MB: this is no table of text."
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
            # Lines that end between the start of what was decoded and the fault.
            line = 1 + self._lines + error.object[: error.start].decode(self.encoding, "ignore").count("\n")
            raise DataError(
                f"{self.path}, about line {line}: byte {error.object[error.start]:#04x} at offset {offset:,} is not {self.encoding} "
                f"({error.reason}). Set data.encoding (auto finds most), or repair the file."
            ) from error
        except UnicodeError as error:
            raise DataError(
                f"{self.path} is not {self.encoding}: {error}. Set data.encoding (auto finds most)."
            ) from error


def count_lines(block: bytes) -> int:
    """Lines of a text; an unfinished one at its end counts only if it is the only one."""
    return max(1, block.count(b"\n") + block.count(b"\r") - block.count(b"\r\n"))


class Lines:
    """The lines of a text with their numbers; they can be put back, and taken as bytes.

    Bytes that are not UTF-8 are lone surrogates in the lines (`surrogateescape`).

    Args:
        blocks: of UTF-8, each of which ends where a line does.

    Attributes:
        number: lines that were taken.
    """

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self.number = 0
        self._blocks = blocks
        self._lines: deque[str] = deque()  # come first
        self._bytes = b""  # after them

    def take(self, count: int) -> list[str]:
        """The next `count` lines, or as many as there are."""
        lines: list[str] = []
        while len(lines) < count and (self._lines or self._decode()):
            lines += [self._lines.popleft() for _ in range(min(count - len(lines), len(self._lines)))]
        self.number += len(lines)
        return lines

    def put_back(self, lines: Sequence[str]) -> None:
        """Give back the lines that were taken last."""
        self._lines.extendleft(reversed(lines))
        self.number -= len(lines)

    def peek_block(self) -> bytes:
        """What comes next as UTF-8, at least a block unless the text ends; it is not taken."""
        first = "".join(self._lines).encode("utf-8", "surrogateescape")
        self._lines.clear()
        self._bytes = b"".join([first, self._bytes, next(self._blocks, b"")])
        return self._bytes

    def skip(self, size: int, lines: int) -> None:
        """Take the first bytes of what `peek_block` has shown: so many lines."""
        self._bytes = self._bytes[size:]
        self.number += lines

    def _decode(self) -> bool:
        text = self._bytes or next(self._blocks, b"")
        self._bytes = b""
        self._lines.extend(io.StringIO(text.decode("utf-8", "surrogateescape"), newline=""))
        return bool(text)


# Which character encoding a table is in.


UTF_8 = ("utf-8", "utf-8-sig")

_SCAN_BLOCK = 1 << 20
_SAMPLE = 1 << 16
_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def find_encoding(path: Path, encoding: str = "auto") -> str:
    """The name of the codec to read a file with.

    Args:
        path: an existing file.
        encoding: `auto` (byte-order marks, then UTF-8 if most lines beyond ASCII are, then a guess that is logged as a warning),
            or a codec's name.

    Raises: ConfigError for an unknown codec, DataError where nothing fits.
    """
    if encoding != "auto":
        try:
            "".encode(encoding)  # refuses those that are not of text, such as base64
            return codecs.lookup(encoding).name
        except (LookupError, UnicodeError, ValueError) as error:
            raise ConfigError(
                f"data.encoding={encoding} is not an encoding that Python knows; leave it at auto."
            ) from error
    with open(path, "rb") as file:
        head = file.read(_SAMPLE)
    for mark, name in _MARKS.items():
        if head.startswith(mark):
            return name
    # UTF-16 without a mark: in mostly Latin text every other byte is zero, and never is in UTF-8.
    even, odd = head[0::2].count(0), head[1::2].count(0)
    if max(even, odd) * 8 > len(head):
        return "utf-16-le" if odd > even else "utf-16-be"
    if _is_utf8(path):
        return "utf-8"
    lines, size = [], 0  # the first that are not ASCII, which tell encodings apart
    with open(path, "rb") as file:
        while size < _SAMPLE and (line := file.readline(_SAMPLE)):
            if not line.isascii():
                lines.append(line)
                size += len(line)
    utf8 = sum(line.decode("utf-8", "ignore").encode() == line for line in lines)
    if utf8 > len(lines) / 2:
        return "utf-8"  # with bad rows: another encoding's lines are hardly ever UTF-8 by chance
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
            f"{path} is not UTF-8 and its encoding could not be found out: set data.encoding (cp1252, gb18030, utf-16-le, …)."
        )
    as_good = [match for match in matches if (match.chaos, match.coherence) == (best.chaos, best.coherence)]
    # The usual one, where nothing speaks against.
    western = any("cp1252" in match.could_be_from_charset for match in as_good)
    encoding = "cp1252" if western else best.encoding
    log.warning("%s is not UTF-8: read as %s. Set data.encoding if its captions look wrong.", path, encoding)
    return encoding
