"""Configuration of text towers that are encoders of Hugging Face's transformers."""

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
    """Configuration keys of text towers that are, or may be, encoders of transformers."""

    name: str | None = Field(
        None, description="name of an encoder on the Hugging Face hub, or a folder that contains one"
    )
    pretrained: bool = Field(True, description="load the pretrained weights of the encoder")
    architecture: dict[str, JsonValue] = Field({}, description="configuration of the encoder, recorded by training")
    trim: bool = Field(
        True, description="trim each batch to its longest text; not supported for encoders whose features would change"
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
                f"{where} pads with id {tokenizer.pad_token_id}, but the padding id of the encoder is {expected}: use the tokenizer of "
                "the encoder."
            )


class HuggingFaceTextConfig(EncoderConfig):
    """Encoder of transformers with pooling and a projection."""

    kind: Literal["huggingface"] = "huggingface"
    name: str = Field(
        description="name of an encoder on the Hugging Face hub, or a folder with its config.json and model.safetensors"
    )
    pooler: Pooler = Field(
        Pooler.mean, description="mean (of the tokens), cls (first token), or own (pooler of the encoder)"
    )
    projection: Projection = Field(
        Projection.mlp, description="projection from the encoder's channels to the shared space: linear, mlp or none"
    )

    openai_tokenizer: ClassVar[bool] = False
    architecture_keys: ClassVar[tuple[str, ...]] = ("pooler", "projection")
    names: ClassVar[dict[str, Names]] = {
        "clip_exp": Names((), ("encoder.",)),
        "open_clip": Names((Row("encoder.", "transformer."), Row("projection.", "proj."), *CHINESE_CLIP), ()),
        "chinese_clip": Names(CHINESE_CLIP, ("bert.",)),
        "bert": Names(  # names in Google's original TensorFlow checkpoints
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
    """Return the configuration of an encoder, as plain values for YAML and JSON.

    Raises:
        ConfigError: the configuration could not be loaded.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder_or_hub_name(name), trust_remote_code=False)
    except Exception as error:  # the hub client and each architecture raise different exceptions
        raise ConfigError(not_loaded(name, error)) from error
    values: dict[str, Any] = json.loads(config.to_json_string(use_diff=True))
    return {key: value for key, value in values.items() if key not in ("_name_or_path", "transformers_version")}


def not_loaded(name: str, error: Exception) -> str:
    """Return a message about an encoder that could not be loaded."""
    lines = str(error).strip().splitlines() or [""]
    return (
        f"{KEY}={name} could not be loaded ({type(error).__name__}: {lines[0].rstrip('.')}). Set it to a folder with an encoder's "
        "config.json and model.safetensors, or to a name on the Hugging Face hub if that can be reached."
    )
