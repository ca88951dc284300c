"""What happens to a text before it is split into tokens: open_clip's three ways, each with equal results on any text."""

import html
import string

import ftfy

from clip_exp.config.model_schema import Cleaning

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def whitespace(text: str) -> str:
    """Repaired, html-unescaped, single-spaced text."""
    if "&" in text or not (text.isascii() and text.isprintable()):  # ftfy leaves printable ASCII as it is
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split())


def lower(text: str) -> str:
    """The same in lower case, as OpenAI's tokenizer has it."""
    return whitespace(text).lower()


def canonicalize(text: str) -> str:
    """The same without ASCII punctuation, as SigLIP was trained (Zhai et al. 2023)."""
    return " ".join(whitespace(text).replace("_", " ").translate(_NO_PUNCTUATION).lower().split())


CLEANINGS = {Cleaning.whitespace: whitespace, Cleaning.lower: lower, Cleaning.canonicalize: canonicalize}
