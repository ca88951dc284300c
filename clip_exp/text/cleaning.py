"""What happens to a text before it is split into tokens: open_clip's three ways, each with equal results on any text."""

import html
import re
import string
from unicodedata import is_normalized

import ftfy
from ftfy import chardata
from ftfy.badness import is_bad

from clip_exp.config.model_schema import Cleaning

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
# Entities, controls, line ends, curly quotes, surrogates, ligatures and full-width forms: what ftfy replaces one by one.
_REPLACED = re.compile(
    "[&\x00-\x1f\x7f-\x9f\u02bc\u2018-\u201f\u2028\u2029\ud800-\udfff"
    + re.escape("".join(map(chr, [*chardata.CONTROL_CHARS, *chardata.LIGATURES, *chardata.WIDTH_MAP])))
    + "]"
)


def whitespace(text: str) -> str:
    """Repaired, html-unescaped, single-spaced text."""
    if "&" in text or not (text.isascii() and text.isprintable()):  # ftfy leaves printable ASCII as it is
        text = html.unescape(html.unescape(_repair(text)))
    return " ".join(text.split())


def _repair(text: str) -> str:
    """`ftfy.fix_text`, which looks twice for each of a dozen faults, only where there may be one."""
    if _REPLACED.search(text) is None and is_normalized("NFC", text) and not is_bad(text):
        return text
    return ftfy.fix_text(text)


def lower(text: str) -> str:
    """The same in lower case, as OpenAI's tokenizer has it."""
    return whitespace(text).lower()


def canonicalize(text: str) -> str:
    """The same without ASCII punctuation, as SigLIP was trained (Zhai et al. 2023)."""
    return " ".join(whitespace(text).replace("_", " ").translate(_NO_PUNCTUATION).lower().split())


CLEANINGS = {Cleaning.whitespace: whitespace, Cleaning.lower: lower, Cleaning.canonicalize: canonicalize}
