"""Tokenizers of the Hugging Face hub, with ids equal to open_clip's `HFTokenizer` (T5's of SigLIP, BERT's, XLM-R's, …).

Only fast ones, which are data for the `tokenizers` library: no code of a repository ever runs.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from clip_exp.config.model_schema import Cleaning, TextTower, TextTowerConfig
from clip_exp.config.paths import folder_or_hub_name
from clip_exp.errors import ConfigError
from clip_exp.text.cleaning import CLEANINGS
from clip_exp.text.tokenizer import pad_tokens

KEY = "model.text.tokenizer"


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
        source = config.tokenizer or config.name
        if source is None:
            raise ConfigError(f"{KEY} has no value: give a folder with a tokenizer's files, or a name on the hub.")
        check_fit(config, load(source))
        return cls(
            source,
            config.context_length,
            cleaning=config.cleaning,
            trims=config.trim and config.kind is not TextTower.siglip,
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
    tokenizer = load(source)
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.enable_truncation(context_length, direction=tokenizer.truncation_side)
    return _Ready(backend, tokenizer.pad_token_id, tokenizer.sep_token_id)


def load(source: str) -> Any:
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


def save(source: str, folder: Path) -> None:
    """Write the tokenizer's files into `folder`, which is then a source as good as the first.

    Raises:
        ConfigError: see `load`.
    """
    load(source).save_pretrained(folder)


def check_fit(config: TextTowerConfig, tokenizer: Any) -> None:
    """Refuse a tokenizer that the tower was not made for.

    Raises:
        ConfigError: ids without an embedding; padding that the encoder would take for words; an end id that the tower would
            not find.
    """
    where = f"{KEY}={config.tokenizer or config.name}"
    # A Hugging Face encoder has its own numbers; until they are noted nothing is known.
    encoded = config.kind is TextTower.huggingface or config.name is not None  # open_clip has such encoders too
    embedded = config.architecture.get("vocab_size") if encoded else config.vocab_size
    highest = max(tokenizer.get_vocab().values())
    if embedded is not None and highest >= embedded:
        raise ConfigError(
            f"{where} has ids up to {highest}, and the text tower embeds {embedded}: give its own tokenizer."
        )
    expected = config.architecture.get("pad_token_id")
    if encoded and expected is not None and tokenizer.pad_token_id != expected:
        raise ConfigError(
            f"{where} pads with {tokenizer.pad_token_id}, and the encoder takes {expected} for padding: give its own tokenizer."
        )
    if config.kind is TextTower.clip and tokenizer("a").input_ids[-1] != highest:
        raise ConfigError(
            f"{where} does not end a text with its highest id, {highest}, which is where model.text.kind=clip looks for the "
            "features: use model/text=huggingface or a SigLIP text tower with it."
        )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__
