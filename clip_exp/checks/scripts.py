"""Which writing a caption is in, and what the tokenizer makes of it."""

from typing import Any

import numpy as np
import regex  # type: ignore[import-untyped]

from clip_exp.text.tokenizer import Tokenizes

# Names of Unicode's property Script (UAX 24). Captions are counted under the one that most of their letters have.
SCRIPTS = (
    "no letters", "Latin", "Han", "Hiragana", "Katakana", "Hangul", "Bopomofo", "Cyrillic", "Greek", "Armenian", "Georgian",
    "Arabic", "Hebrew", "Syriac", "Thaana", "Devanagari", "Bengali", "Gurmukhi", "Gujarati", "Oriya", "Tamil", "Telugu",
    "Kannada", "Malayalam", "Sinhala", "Thai", "Lao", "Khmer", "Myanmar", "Tibetan", "Mongolian", "Ethiopic", "Cherokee", "other",
)  # fmt: skip
NO_LETTERS, LATIN, OTHER = 0, 1, len(SCRIPTS) - 1
# Times the tokens per character of English. OpenAI's BPE: Han 11, Arabic 4; XLM-R: Han 2.6, Arabic 1.2.
SPLIT_BADLY = 3.0
ENGLISH = (
    "a photo of a dog running on the beach with a ball in its mouth",
    "Two children in red jackets play in the snow.",
    "A man is riding his bicycle along a street of old houses, and a woman waits at the corner with an umbrella.",
    "close-up of fresh vegetables on a wooden table",
)

_RUNS = regex.compile(
    "|".join(rf"(?P<{name}>\p{{Script={name}}}+)" for name in SCRIPTS[1:-1]) + rf"|(?P<{SCRIPTS[-1]}>\p{{L}})"
)
_NUMBER = {name: number for number, name in enumerate(SCRIPTS)}


def script_of(caption: str) -> int:
    """The number in `SCRIPTS` of the script that most of a caption's letters have."""
    if caption.isascii():
        return LATIN if any(map(str.isalpha, caption)) else NO_LETTERS
    letters = [0] * len(SCRIPTS)
    for run in _RUNS.finditer(caption):
        letters[_NUMBER[run.lastgroup]] += run.end() - run.start()
    return int(np.argmax(letters)) if any(letters) else NO_LETTERS


def english_tokens_per_character(tokenizer: Tokenizes, special: int) -> float:
    """Of plain English captions: what other scripts are compared with, whatever the data holds."""
    tokens = sum(len(ids) - special for ids in tokenizer.encode_batch(ENGLISH))
    return tokens / sum(map(len, ENGLISH))


def describe_scripts(rows: np.ndarray, english: float) -> dict[str, dict[str, Any]]:
    """By script, the most frequent first.

    Args:
        rows: of `scan.ROW`.
        english: `english_tokens_per_character`.

    Returns: of each: `captions`, `share`, `tokens_per_character`, `times_english`, `split_badly`, and as an `example` the
        number of a row of the middle length.
    """
    count = np.bincount(rows["script"], minlength=len(SCRIPTS))
    tokens = np.bincount(rows["script"], rows["tokens"], len(SCRIPTS))
    characters = np.bincount(rows["script"], rows["characters"], len(SCRIPTS))
    described: dict[str, dict[str, Any]] = {}
    for script in sorted(np.flatnonzero(count).tolist(), key=lambda script: -int(count[script])):
        ratio = float(tokens[script] / max(characters[script], 1))
        described[SCRIPTS[script]] = {
            "captions": int(count[script]),
            "share": count[script] / len(rows),
            "tokens_per_character": ratio,
            "times_english": ratio / english,
            "split_badly": script != NO_LETTERS and ratio / english >= SPLIT_BADLY,
            "example": _typical(rows, script),
        }
    return described


def _typical(rows: np.ndarray, script: int) -> int:
    found = np.flatnonzero(rows["script"] == script)
    lengths = rows["characters"][found]
    return int(found[np.argmin(np.abs(lengths - np.median(lengths)))])
