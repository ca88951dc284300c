"""Captions to the ids that a text tower takes: OpenAI's byte-pair tokenizer, and the tokenizers of the Hugging Face hub.

A caption is cleaned, split into words, mapped to ids, cut to the context length and padded. Ids equal open_clip's on any input.
"""

import gzip
import html
import re
import string
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from unicodedata import is_normalized

import ftfy
import numpy as np
import regex  # type: ignore[import-untyped]
import torch
from ftfy import chardata
from ftfy.badness import is_bad
from tokenizers.models import BPE
from torch import Tensor

from clip_exp.config.model import Cleaning, TextTowerConfig, folder_or_hub_name
from clip_exp.errors import ConfigError
from clip_exp.open_clip_files import vocabulary_file

KEY = "model.text.tokenizer"
PAD = 0


class Tokenizes(Protocol):
    """Captions to ids. Cheap to pickle: workers get a copy each.

    Attributes:
        context_length: the most ids of a caption; longer ones are cut, the end id stays.
        truncated: how many captions this object has cut.
    """

    context_length: int
    truncated: int

    def encode(self, text: str) -> list[int]:
        """Ids of a caption, without padding."""
        ...

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """Ids of each caption."""
        ...

    def pad(self, token_lists: Sequence[Sequence[int]], multiple: int = 1) -> Tensor:
        """Ids [N, L], int64, as the text tower takes them.

        L is the longest list rounded up to `multiple` where the tower gives the same features for it; else `context_length`.
        """
        ...

    def __call__(self, texts: str | Iterable[str]) -> Tensor:
        """Padded ids of one caption or several."""
        ...


def build_tokenizer(config: TextTowerConfig) -> Tokenizes:
    """The tokenizer of a text tower.

    Raises:
        ConfigError: one that is named cannot be had.
    """
    if config.uses_openai_tokenizer:
        return Tokenizer(config.context_length, trims=config.trims)
    return HuggingFaceTokenizer.of(config)


# What happens to a text before it is split into tokens: open_clip's three ways, each with equal results on any text.

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


# OpenAI's byte-pair tokenizer (Radford et al. 2021), with ids equal to open_clip's `SimpleTokenizer` on any input.
# Text is cleaned and split into words with the same library and pattern as there. A word's ids come from a bounded cache, and
# on a miss from the `tokenizers` library, so that a caption costs about as much as splitting it.

VOCAB_SIZE = 49408
START, END = 49406, 49407  # the largest id ends a text: towers pool at the argmax of the ids

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
        for match in _WORD.finditer(lower(text)):
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


# Tokenizers of the Hugging Face hub, with ids equal to open_clip's `HFTokenizer` (T5's of SigLIP, BERT's, XLM-R's, …).
# Only fast ones, which are data for the `tokenizers` library: no code of a repository ever runs.


class HuggingFaceTokenizer:
    """Captions to ids. Cheap to pickle: each process reads the files itself, at its first caption.

    Args:
        source: a folder with the tokenizer's files, or a name on the hub.
        context_length: the most ids of a caption, special ones included. Longer captions are cut; the end id stays.
        cleaning: of a caption before it is split.
        trims: a batch may be as short as its longest caption: the text tower gives the same features then.
        strip_sep_token: zeros in the place of separators.

    Attributes:
        truncated: how many captions this object has cut.
    """

    def __init__(
        self,
        source: str,
        context_length: int = 77,
        *,
        cleaning: Cleaning = Cleaning.whitespace,
        trims: bool = True,
        strip_sep_token: bool = False,
    ) -> None:
        self.source, self.context_length, self.trims = source, context_length, trims
        self.cleaning, self.strip_sep_token = cleaning, strip_sep_token
        self.truncated = 0

    @classmethod
    def of(cls, config: TextTowerConfig) -> "HuggingFaceTokenizer":
        """The tokenizer of a text tower, read now.

        Raises:
            ConfigError: it cannot be had, or the tower has no embedding for some of its ids.
        """
        source = config.tokenizer_source
        if source is None:
            raise ConfigError(f"{KEY} has no value: give a folder with a tokenizer's files, or a name on the hub.")
        if problem := next(config.tokenizer_problems(f"{KEY}={source}", load_huggingface(source)), None):
            raise ConfigError(problem)
        return cls(
            source,
            config.context_length,
            cleaning=config.cleaning,
            trims=config.trims,
            strip_sep_token=config.strip_sep_token,
        )

    def encode(self, text: str) -> list[int]:
        """Ids of a caption, special ones included; at most `context_length` of them."""
        ready = _ready(self.source, self.context_length)
        return self._ids(ready, ready.backend.encode(CLEANINGS[self.cleaning](text)))

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """Ids of each caption."""
        ready, clean = _ready(self.source, self.context_length), CLEANINGS[self.cleaning]
        return [self._ids(ready, encoding) for encoding in ready.backend.encode_batch([clean(text) for text in texts])]

    def _ids(self, ready: "_Ready", encoding: Any) -> list[int]:
        self.truncated += bool(encoding.overflowing)
        if not self.strip_sep_token:
            return encoding.ids
        return [0 if token == ready.sep_id else token for token in encoding.ids]

    def pad(self, token_lists: Sequence[Sequence[int]], multiple: int = 1) -> Tensor:
        """Ids [N, L], int64, filled up with the tokenizer's padding.

        L is the longest list rounded up to `multiple`, at most `context_length`; always that where the tokenizer does not trim.
        """
        pad_id = _ready(self.source, self.context_length).pad_id
        return pad_tokens(token_lists, self.context_length, multiple if self.trims else self.context_length, pad_id)

    def __call__(self, texts: str | Iterable[str]) -> Tensor:
        """Padded ids of one caption or several."""
        return self.pad(self.encode_batch([texts] if isinstance(texts, str) else texts))


class _Ready(NamedTuple):
    """A tokenizer that cuts, in a process."""

    backend: Any  # tokenizers.Tokenizer
    pad_id: int
    sep_id: int | None


@lru_cache(maxsize=4)
def _ready(source: str, context_length: int) -> _Ready:
    tokenizer = load_huggingface(source)
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.enable_truncation(context_length, direction=tokenizer.truncation_side)
    return _Ready(backend, tokenizer.pad_token_id, tokenizer.sep_token_id)


def load_huggingface(source: str) -> Any:
    """A `transformers.PreTrainedTokenizerFast`.

    Args:
        source: a folder, or a name on the hub.

    Raises:
        ConfigError: there is none, it needs code of its own, or it has no padding.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder_or_hub_name(source), use_fast=True, trust_remote_code=False)
    except Exception as error:  # each kind of tokenizer, and the hub, fail in ways of their own
        raise ConfigError(
            f"{KEY}={source} cannot be had ({_first_line(error)}). Give a folder that holds its files, such as "
            f"tokenizer.json and tokenizer_config.json ({KEY}=DIR), or a name on the hub while it can be reached."
        ) from error
    if not tokenizer.is_fast:
        raise ConfigError(f"{KEY}={source} is no fast tokenizer: give one that has a tokenizer.json.")
    if tokenizer.pad_token_id is None:
        raise ConfigError(f"{KEY}={source} has no padding token: set pad_token in its tokenizer_config.json.")
    return tokenizer


def save_huggingface(source: str, folder: Path) -> None:
    """Write the tokenizer's files into `folder`, which is then a source as good as the first.

    Raises:
        ConfigError: see `load_huggingface`.
    """
    load_huggingface(source).save_pretrained(folder)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__
