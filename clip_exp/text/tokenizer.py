"""OpenAI's byte-pair tokenizer (Radford et al. 2021), with ids equal to open_clip's `SimpleTokenizer` on any input.

Text is cleaned and split into words with the same library and pattern as there. A word's ids come from a bounded cache, and
on a miss from the `tokenizers` library, so that a caption costs about as much as splitting it.
"""

import gzip
from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np
import regex  # type: ignore[import-untyped]
import torch
from tokenizers.models import BPE
from torch import Tensor

from clip_exp.open_clip_files import vocabulary_file
from clip_exp.text.cleaning import lower as clean

VOCAB_SIZE = 49408
START, END = 49406, 49407  # the largest id ends a text: towers pool at the argmax of the ids
PAD = 0

_SPECIAL = {"<start_of_text>": START, "<end_of_text>": END}
_WORD = regex.compile(
    r"<start_of_text>|<end_of_text>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", regex.IGNORECASE
)
_CACHED_WORDS = 1 << 16
_CACHED_WORD_LENGTH = 64  # characters


def _byte_alphabet() -> list[str]:
    """A printable character for each byte, printable Latin-1 standing for itself (GPT-2's reversible byte encoding)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [alphabet[byte] for byte in range(256)]


def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Ids of all symbols but the two special ones: bytes, bytes that end a word, merged pairs. And the merges, in order.

    Raises:
        ConfigError: the vocabulary's file is missing.
    """
    alphabet = _byte_alphabet()
    lines = gzip.decompress(vocabulary_file().read_bytes()).decode("utf-8").split("\n")
    pairs = (line.split() for line in lines[1 : VOCAB_SIZE - 2 * 256 - 2 + 1])
    merges = [(left, right) for left, right in pairs]
    printable_first = sorted(alphabet, key=lambda char: (ord(char) >= 256, ord(char)))
    symbols = [*printable_first, *(char + "</w>" for char in printable_first), *map("".join, merges)]
    return {symbol: i for i, symbol in enumerate(symbols)}, merges


class _WordIds:
    """Ids of single words, remembered."""

    def __init__(self) -> None:
        self._alphabet = _byte_alphabet()
        self._bpe = BPE(*vocabulary(), end_of_word_suffix="</w>")
        self._cache: dict[str, tuple[int, ...]] = {word: (i,) for word, i in _SPECIAL.items()}

    def __call__(self, word: str) -> tuple[int, ...]:
        ids = self._cache.get(word)
        if ids is None:
            encoded = "".join([self._alphabet[byte] for byte in word.encode("utf-8")])
            ids = tuple(token.id for token in self._bpe.tokenize(encoded))
            if len(word) <= _CACHED_WORD_LENGTH and len(self._cache) < _CACHED_WORDS:
                self._cache[word] = ids
        return ids


@lru_cache(maxsize=1)
def _word_ids() -> _WordIds:
    return _WordIds()


def pad_tokens(
    token_lists: Sequence[Sequence[int]], context_length: int, multiple: int = 1, pad_id: int = PAD
) -> Tensor:
    """Ids [N, L], int64, filled up with `pad_id`; L is the longest list rounded up to `multiple`, at most `context_length`."""
    longest = max((len(tokens) for tokens in token_lists), default=1)
    length = min(-(-longest // multiple) * multiple, context_length)
    padded = np.full((len(token_lists), length), pad_id, dtype=np.int64)
    for row, tokens in zip(padded, token_lists, strict=True):
        row[: len(tokens)] = tokens
    return torch.from_numpy(padded)


class Tokenizer:
    """Captions to ids. Cheap to build and to pickle: the vocabulary is read once per process, at the first caption.

    Args:
        context_length: the most ids of a caption, start and end included. Longer captions are cut; the end id stays.
        trims: a batch may be as short as its longest caption: the text tower gives the same features then.

    Attributes:
        truncated: how many captions this object has cut.
    """

    def __init__(self, context_length: int = 77, *, trims: bool = True) -> None:
        self.context_length = context_length
        self.trims = trims
        self.truncated = 0

    def encode(self, text: str) -> list[int]:
        """Ids of a caption: start, words, end; at most `context_length` of them."""
        word_ids, room = _word_ids(), self.context_length - 1
        ids = [START]
        for match in _WORD.finditer(clean(text)):
            ids.extend(word_ids(match.group()))
            if len(ids) > room:
                self.truncated += 1
                del ids[room:]
                break
        ids.append(END)
        return ids

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """Ids of each caption."""
        return [self.encode(text) for text in texts]

    def pad(self, token_lists: Sequence[Sequence[int]], multiple: int = 1) -> Tensor:
        """Zero-padded ids [N, L], int64; L is the longest list rounded up to `multiple`, at most `context_length`."""
        return pad_tokens(token_lists, self.context_length, multiple if self.trims else self.context_length)

    def __call__(self, texts: str | Iterable[str], *, trim: bool = True, multiple: int = 1) -> Tensor:
        """Zero-padded ids [N, L], int64.

        Args:
            texts: one caption or several.
            trim: L is the longest caption, rounded up to `multiple`; otherwise `context_length`. A causal text tower that
                pools at the end id gives the same features either way.
            multiple: what L is rounded up to, never above `context_length`.
        """
        tokens = self.encode_batch([texts] if isinstance(texts, str) else texts)
        return self.pad(tokens, multiple if trim else self.context_length)
