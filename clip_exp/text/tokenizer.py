"""Tokenizers: OpenAI's byte-pair encoding, and tokenizers of the Hugging Face hub.

A caption is cleaned, split into words, mapped to ids, truncated to the context length and padded. The ids equal
open_clip's for all input.
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
    """Protocol of tokenizers. They are cheap to pickle, since every worker process gets a copy.

    Attributes:
        context_length: maximum number of ids of a caption; longer captions are truncated before the end id.
        truncated: number of captions that this object has truncated.
    """

    context_length: int
    truncated: int

    def encode(self, text: str) -> list[int]:
        """Return the ids of a caption, without padding."""
        ...

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """Return the ids of each caption, without padding."""
        ...

    def pad(self, token_lists: Sequence[Sequence[int]], multiple: int = 1) -> Tensor:
        """Return padded ids [N, L], int64, the input of the text tower.

        L is the length of the longest list, rounded up to `multiple`, if the tower gives the same features for it; else
        `context_length`.
        """
        ...

    def __call__(self, texts: str | Iterable[str]) -> Tensor:
        """Return the padded ids of one or several captions."""
        ...


def build_tokenizer(config: TextTowerConfig) -> Tokenizes:
    """Build the tokenizer of a text tower.

    Raises:
        ConfigError: the tokenizer is not available, or does not fit the tower.
    """
    if config.uses_openai_tokenizer:
        return Tokenizer(config.context_length, trims=config.trims)
    return HuggingFaceTokenizer.of(config)


# Text normalization before tokenization: the three variants of open_clip, with the same results for all texts

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
# Entities, control characters, line ends, curly quotes, surrogates, ligatures and full-width forms, which ftfy replaces
_REPLACED = re.compile(
    "[&\x00-\x1f\x7f-\x9f\u02bc\u2018-\u201f\u2028\u2029\ud800-\udfff"
    + re.escape("".join(map(chr, [*chardata.CONTROL_CHARS, *chardata.LIGATURES, *chardata.WIDTH_MAP])))
    + "]"
)


def whitespace(text: str) -> str:
    """Repair broken characters, decode HTML entities, and collapse whitespace."""
    # ftfy does not change printable ASCII.
    if "&" in text or not (text.isascii() and text.isprintable()):
        text = html.unescape(html.unescape(_repair(text)))
    return " ".join(text.split())


def _repair(text: str) -> str:
    """Apply `ftfy.fix_text`, which is slow, only to texts that it may change."""
    if _REPLACED.search(text) is None and is_normalized("NFC", text) and not is_bad(text):
        return text
    return ftfy.fix_text(text)


def lower(text: str) -> str:
    """Normalize a text as `whitespace` does and convert it to lower case, as OpenAI's tokenizer does."""
    return whitespace(text).lower()


def canonicalize(text: str) -> str:
    """Normalize a text as `lower` does and remove ASCII punctuation, as in the training of SigLIP (Zhai et al. 2023)."""
    return " ".join(whitespace(text).replace("_", " ").translate(_NO_PUNCTUATION).lower().split())


CLEANINGS = {Cleaning.whitespace: whitespace, Cleaning.lower: lower, Cleaning.canonicalize: canonicalize}


def pad_tokens(
    token_lists: Sequence[Sequence[int]], context_length: int, multiple: int = 1, pad_id: int = PAD
) -> Tensor:
    """Pad lists of ids with `pad_id` to [N, L], int64; L is the longest list rounded up to `multiple`, at most `context_length`."""
    longest = max((len(tokens) for tokens in token_lists), default=1)
    length = min(-(-longest // multiple) * multiple, context_length)
    padded = np.full((len(token_lists), length), pad_id, dtype=np.int64)
    for row, tokens in zip(padded, token_lists, strict=True):
        row[: len(tokens)] = tokens
    return torch.from_numpy(padded)


# OpenAI's byte-pair tokenizer (Radford et al. 2021), with the same ids as open_clip's `SimpleTokenizer` for all input.
# Texts are cleaned and split into words with the same libraries and pattern. The ids of words come from a bounded
# cache, and on a miss from the `tokenizers` library, so that encoding a caption takes hardly longer than splitting it.

VOCAB_SIZE = 49408
# The end id must be the largest one, since towers pool at the argmax of the ids.
START, END = 49406, 49407

_SPECIAL = {"<start_of_text>": START, "<end_of_text>": END}
_WORD = regex.compile(
    r"<start_of_text>|<end_of_text>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", regex.IGNORECASE
)
_CACHED_WORDS = 1 << 16
# Maximum number of characters of a cached word
_CACHED_WORD_LENGTH = 64


def _byte_alphabet() -> list[str]:
    """Return a printable character for each byte (GPT-2's reversible byte encoding); printable Latin-1 characters represent themselves."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [alphabet[byte] for byte in range(256)]


def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return the ids of all symbols except the two special ones (bytes, bytes at the end of a word, merged pairs), and the merges in order.

    Raises:
        ConfigError: the file of the vocabulary is missing.
    """
    alphabet = _byte_alphabet()
    lines = gzip.decompress(vocabulary_file().read_bytes()).decode("utf-8").split("\n")
    pairs = (line.split() for line in lines[1 : VOCAB_SIZE - 2 * 256 - 2 + 1])
    merges = [(left, right) for left, right in pairs]
    printable_first = sorted(alphabet, key=lambda char: (ord(char) >= 256, ord(char)))
    symbols = [*printable_first, *(char + "</w>" for char in printable_first), *map("".join, merges)]
    return {symbol: i for i, symbol in enumerate(symbols)}, merges


class _WordIds:
    """Cached function from a word to its ids."""

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
    """OpenAI's tokenizer. It is cheap to build and to pickle, since each process reads the vocabulary at its first caption.

    Args:
        context_length: maximum number of ids of a caption, including start and end. Longer captions are truncated
            before the end id.
        trims: whether a batch may be padded to its longest caption only, because the text tower gives the same features.

    Attributes:
        truncated: number of captions that this object has truncated.
    """

    def __init__(self, context_length: int = 77, *, trims: bool = True) -> None:
        self.context_length = context_length
        self.trims = trims
        self.truncated = 0

    def encode(self, text: str) -> list[int]:
        """Return the ids of a caption: start, words, end; at most `context_length` ids."""
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
        """Return the ids of each caption, without padding."""
        return [self.encode(text) for text in texts]

    def pad(self, token_lists: Sequence[Sequence[int]], multiple: int = 1) -> Tensor:
        """Pad lists of ids with zeros to [N, L], int64; L is the longest list rounded up to `multiple`, at most `context_length`."""
        return pad_tokens(token_lists, self.context_length, multiple if self.trims else self.context_length)

    def __call__(self, texts: str | Iterable[str], *, trim: bool = True, multiple: int = 1) -> Tensor:
        """Return zero-padded ids [N, L], int64.

        Args:
            texts: one or several captions.
            trim: L is the length of the longest caption rounded up to `multiple`; False: `context_length`. A causal
                text tower that pools at the end id gives the same features in both cases.
            multiple: number that L is rounded up to a multiple of, at most `context_length`.
        """
        tokens = self.encode_batch([texts] if isinstance(texts, str) else texts)
        return self.pad(tokens, multiple if trim else self.context_length)


# Tokenizers of the Hugging Face hub, with the same ids as open_clip's `HFTokenizer` (SigLIP's T5, BERT, XLM-R, …). Only
# fast tokenizers are supported: they are data for the `tokenizers` library, so code in a repository is never executed.


class HuggingFaceTokenizer:
    """Tokenizer of the Hugging Face hub. It is cheap to pickle, since each process reads the files at its first caption.

    Args:
        source: folder with the tokenizer's files, or name on the hub.
        context_length: maximum number of ids of a caption, including special ones. Longer captions are truncated before
            the end id.
        cleaning: normalization of a caption before tokenization.
        trims: whether a batch may be padded to its longest caption only, because the text tower gives the same features.
        strip_sep_token: replace separator tokens by zeros.

    Attributes:
        truncated: number of captions that this object has truncated.
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
        """Load and check the tokenizer of a text tower.

        Raises:
            ConfigError: the tokenizer is not available, or the tower has no embedding for some of its ids.
        """
        source = config.tokenizer_source
        if source is None:
            raise ConfigError(f"{KEY} has no value: set a folder with a tokenizer's files, or a name on the hub.")
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
        """Return the ids of a caption, including special ones; at most `context_length` ids."""
        ready = _ready(self.source, self.context_length)
        return self._ids(ready, ready.backend.encode(CLEANINGS[self.cleaning](text)))

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """Return the ids of each caption, without padding."""
        ready, clean = _ready(self.source, self.context_length), CLEANINGS[self.cleaning]
        return [self._ids(ready, encoding) for encoding in ready.backend.encode_batch([clean(text) for text in texts])]

    def _ids(self, ready: "_Ready", encoding: Any) -> list[int]:
        self.truncated += bool(encoding.overflowing)
        if not self.strip_sep_token:
            return encoding.ids
        return [0 if token == ready.sep_id else token for token in encoding.ids]

    def pad(self, token_lists: Sequence[Sequence[int]], multiple: int = 1) -> Tensor:
        """Pad lists of ids with the tokenizer's padding id to [N, L], int64.

        L is the longest list rounded up to `multiple`, at most `context_length`; always `context_length` if `trims` is
        False.
        """
        pad_id = _ready(self.source, self.context_length).pad_id
        return pad_tokens(token_lists, self.context_length, multiple if self.trims else self.context_length, pad_id)

    def __call__(self, texts: str | Iterable[str]) -> Tensor:
        """Return the padded ids of one or several captions."""
        return self.pad(self.encode_batch([texts] if isinstance(texts, str) else texts))


class _Ready(NamedTuple):
    """Loaded tokenizer with truncation.

    Attributes:
        backend: `tokenizers.Tokenizer`.
        pad_id: id of the padding token.
        sep_id: id of the separator token, if any.
    """

    backend: Any
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
    """Load a `transformers.PreTrainedTokenizerFast`.

    Args:
        source: folder, or name on the hub.

    Raises:
        ConfigError: the tokenizer is not available, needs code from its repository, or has no padding token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder_or_hub_name(source), use_fast=True, trust_remote_code=False)
    except Exception as error:
        # The various tokenizers, and the hub, raise various exceptions.
        raise ConfigError(
            f"{KEY}={source} could not be loaded ({_first_line(error)}). Give a folder with its files, such as "
            f"tokenizer.json and tokenizer_config.json ({KEY}=DIR), or a name on the hub while it can be reached."
        ) from error
    if not tokenizer.is_fast:
        raise ConfigError(f"{KEY}={source} is not a fast tokenizer: give one with a tokenizer.json.")
    if tokenizer.pad_token_id is None:
        raise ConfigError(f"{KEY}={source} has no padding token: set pad_token in its tokenizer_config.json.")
    return tokenizer


def save_huggingface(source: str, folder: Path) -> None:
    """Save the tokenizer's files to `folder`, which can then be used as `source`.

    Raises:
        ConfigError: see `load_huggingface`.
    """
    load_huggingface(source).save_pretrained(folder)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__
