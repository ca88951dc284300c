"""From a text tower's configuration to the tokenizer that belongs to it."""

from collections.abc import Iterable, Sequence
from typing import Protocol

from torch import Tensor

from clip_exp.config.model_rules import uses_openai
from clip_exp.config.model_schema import TextTowerConfig
from clip_exp.text.huggingface import HuggingFaceTokenizer
from clip_exp.text.tokenizer import Tokenizer


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
    if uses_openai(config):
        return Tokenizer(config.context_length, trims=config.trim)
    return HuggingFaceTokenizer.of(config)
