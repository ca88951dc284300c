"""Any text encoder of Hugging Face's transformers as text tower."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, JsonValue

from clip_exp.config.model import ModelConfig, Pooler, Projection, TextTowerConfig, Tower, folder_or_hub_name
from clip_exp.errors import ConfigError
from clip_exp.renaming import TRANSPOSED, Names, Row

if TYPE_CHECKING:
    from torch import nn

KEY = "model.text.name"
CHINESE_CLIP = (Row("encoder.", "bert."), Row("projection.weight", "text_projection", TRANSPOSED))


class EncoderConfig(TextTowerConfig):
    """Fields of a text tower that is, or may be, an encoder of transformers."""

    name: str | None = Field(None, description="name of an encoder on the hub, or a folder of one")
    pretrained: bool = Field(True, description="start from the encoder's own weights")
    architecture: dict[str, JsonValue] = Field({}, description="the encoder's own configuration, noted by training")
    trim: bool = Field(
        True, description="cut a batch to its longest text; not where that would change features (some of open_clip)"
    )

    foreign: ClassVar[bool] = True

    @property
    def own_weights(self) -> bool:
        return self.pretrained and self.name is not None

    @property
    def trims(self) -> bool:
        return self.trim

    def resolved(self, own_weights: bool) -> Self:
        if self.name is None or self.architecture:
            return self
        return self.model_copy(update={"architecture": note_architecture(self.name)})

    def as_resolved(self, earlier: Tower) -> Self:
        architecture = self.architecture or getattr(earlier, "architecture", {})
        return self.model_copy(update={"architecture": architecture})

    def portable(self) -> Self:
        text = super().portable().resolved(own_weights=False)
        if self.name is not None and Path(self.name).expanduser().is_dir():
            return text.model_copy(update={"name": Path(self.name).name})
        return text

    def tokenizer_problems(self, where: str, tokenizer: Any) -> Iterator[str]:
        embedded, expected = self.architecture.get("vocab_size"), self.architecture.get("pad_token_id")
        if isinstance(embedded, int):
            yield from self.embedding_problems(where, tokenizer, embedded)
        if expected is not None and tokenizer.pad_token_id != expected:
            yield (
                f"{where} pads with {tokenizer.pad_token_id}, and the encoder takes {expected} for padding: give its own "
                "tokenizer."
            )


class HuggingFaceTextConfig(EncoderConfig):
    """An encoder of transformers, pooled and projected."""

    kind: Literal["huggingface"] = "huggingface"
    name: str = Field(
        description="name of an encoder on the hub, or a folder with its config.json and model.safetensors"
    )
    pooler: Pooler = Field(
        Pooler.mean, description="mean of the tokens, cls (the first), or own (the encoder's pooler)"
    )
    projection: Projection = Field(
        Projection.mlp, description="linear, mlp or none, from its channels to the shared space"
    )

    openai_tokenizer: ClassVar[bool] = False
    architecture_keys: ClassVar[tuple[str, ...]] = ("pooler", "projection")
    names: ClassVar[dict[str, Names]] = {
        "clip_exp": Names((), ("encoder.",)),
        "open_clip": Names((Row("encoder.", "transformer."), Row("projection.", "proj."), *CHINESE_CLIP), ()),
        "chinese_clip": Names(CHINESE_CLIP, ("bert.",)),
        "bert": Names(  # as Google published it, from TensorFlow
            (
                Row("encoder.", "bert."),
                Row(".LayerNorm.weight", ".LayerNorm.gamma"),
                Row(".LayerNorm.bias", ".LayerNorm.beta"),
            ),
            ("bert.",),
        ),
        "transformers": Names(
            (Row("encoder.", "text_model."), Row("projection.", "text_projection.")), ("text_model.",)
        ),
    }

    @property
    def tokenizer_source(self) -> str | None:
        return self.tokenizer or self.name

    def build(self, model: ModelConfig, own_weights: bool = False) -> "nn.Module":
        from clip_exp.models.families.huggingface.tower import build_tower  # imports torch

        return build_tower(self, model, own_weights)


def note_architecture(name: str) -> dict[str, Any]:
    """Return an encoder's own configuration, as plain values that YAML and JSON keep.

    Raises:
        ConfigError: it cannot be had.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder_or_hub_name(name), trust_remote_code=False)
    except Exception as error:  # the hub's client and each architecture fail in ways of their own
        raise ConfigError(not_loaded(name, error)) from error
    values: dict[str, Any] = json.loads(config.to_json_string(use_diff=True))
    return {key: value for key, value in values.items() if key not in ("_name_or_path", "transformers_version")}


def not_loaded(name: str, error: Exception) -> str:
    """Return why an encoder could not be loaded."""
    lines = str(error).strip().splitlines() or [""]
    return (
        f"{KEY}={name} cannot be had ({type(error).__name__}: {lines[0].rstrip('.')}). Give a folder that holds an encoder's "
        "config.json and model.safetensors, or a name on the hub while it can be reached."
    )
