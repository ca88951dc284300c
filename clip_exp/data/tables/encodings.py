"""Which character encoding a table is in."""

import codecs
import logging
from pathlib import Path

from clip_exp.errors import ConfigError, DataError

log = logging.getLogger(__name__)

UTF_8 = ("utf-8", "utf-8-sig")

_BLOCK = 1 << 20
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
    if guess := _unmarked_utf16(head):
        return guess
    if _is_utf8(path):
        return "utf-8"
    lines = _lines_beyond_ascii(path)
    if _share_of_utf8(lines) > 0.5:
        return "utf-8"  # with bad rows: another encoding's lines are hardly ever UTF-8 by chance
    return _guess(path, b"".join(lines))


def _unmarked_utf16(head: bytes) -> str | None:
    """UTF-16 without a mark: in mostly Latin text every other byte is zero, and never is in UTF-8."""
    even, odd = head[0::2].count(0), head[1::2].count(0)
    if max(even, odd) * 8 <= len(head):
        return None
    return "utf-16-le" if odd > even else "utf-16-be"


def _is_utf8(path: Path) -> bool:
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        with open(path, "rb") as file:
            while block := file.read(_BLOCK):
                decoder.decode(block)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return True


def _share_of_utf8(lines: list[bytes]) -> float:
    return sum(_decodes(line) for line in lines) / max(1, len(lines))


def _decodes(line: bytes) -> bool:
    try:
        line.decode("utf-8")
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
    western = any(
        "cp1252" in match.could_be_from_charset for match in as_good
    )  # the usual one, where nothing speaks against
    encoding = "cp1252" if western else best.encoding
    log.warning("%s is not UTF-8: read as %s. Set data.encoding if its captions look wrong.", path, encoding)
    return encoding


def _lines_beyond_ascii(path: Path) -> list[bytes]:
    """The first lines that tell encodings apart."""
    lines: list[bytes] = []
    size = 0
    with open(path, "rb") as file:
        while size < _SAMPLE and (line := file.readline(_SAMPLE)):
            if not line.isascii():
                lines.append(line)
                size += len(line)
    return lines
