"""Towers of any of open_clip's configurations (Ilharco et al. 2021), built by open_clip itself.

Their weights have open_clip's names, with the prefixes `image.` and `text.`. For CoCa only the two contrastive towers are supported,
without the decoder. The configuration is chosen by the model (`model.open_clip_name`), so both towers must be open_clip's.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field

from clip_exp.config.base import Proportion, Size, Unused
from clip_exp.config.model import VOCABULARY, ImageTowerConfig, ModelConfig, TextTowerConfig
from clip_exp.models.families.clip import open_clip_activation
from clip_exp.models.families.huggingface import EncoderConfig
from clip_exp.models.families.timm import as_trained
from clip_exp.open_clip_files import can_be_trimmed, has_text_below, open_clip_values, published

if TYPE_CHECKING:
    from torch import nn


def _both_towers(model: ModelConfig, at: str) -> Iterator[str]:
    if not (isinstance(model.image, OpenCLIPImageConfig) and isinstance(model.text, OpenCLIPTextConfig)):
        yield f"{at}image.kind=open_clip and {at}text.kind=open_clip must be used together: set model=open_clip model.name=…"


def _cfg(model: ModelConfig, tower: str, **changed: Any) -> dict[str, Any]:
    # The towers of CoCa also return their tokens, but only for the decoder, which is not supported.
    activation = open_clip_activation(model)
    return {**published(model.open_clip_name)[tower], **changed, "output_tokens": False, **activation}


class OpenCLIPImageConfig(ImageTowerConfig):
    """Image tower of an open_clip configuration."""

    kind: Literal["open_clip"] = "open_clip"
    name: str | None = Field(None, description="name of its timm backbone, if it has one")
    pretrained: bool = Field(False, description="load the pretrained weights of the backbone")
    patch_dropout: Proportion = Field(
        0.0, description="fraction of the patches that are dropped in training, if the tower has patches"
    )

    in_open_clip: ClassVar[bool] = True
    foreign: ClassVar[bool] = True
    takes_activation: ClassVar[bool] = True
    own_activation: ClassVar[bool] = True
    unused: ClassVar[tuple[Unused, ...]] = (
        Unused(
            "pretrained",
            lambda image: image.name is None,
            "on a tower without a backbone of timm",
            "weights of a whole model are pretrained=…",
        ),
    )

    @property
    def own_weights(self) -> bool:
        return self.pretrained and self.name is not None

    def build(self, model: ModelConfig, own_weights: bool = False) -> "nn.Module":
        from clip_exp.models.families.open_clip.towers import build_image_tower  # imports torch

        return build_image_tower(self, model, own_weights)

    def resolved(self, own_weights: bool) -> Self:
        return as_trained(self, self.name) if own_weights and self.own_weights and self.name else self

    def fits(self, model: ModelConfig, at: str) -> Iterator[str]:
        yield from _both_towers(model, at)

    def open_clip_model(self, model: ModelConfig) -> dict[str, Any]:
        return {key: value for key, value in published(model.open_clip_name).items() if key != "multimodal_cfg"}

    def open_clip_cfg(self, model: ModelConfig) -> dict[str, Any]:
        return _cfg(model, "vision_cfg", image_size=self.image_size)


class OpenCLIPTextConfig(EncoderConfig):
    """Text tower of an open_clip configuration, which may be an encoder of Hugging Face."""

    kind: Literal["open_clip"] = "open_clip"
    vocab_size: Size = Field(VOCABULARY, description="number of tokens in the vocabulary")

    in_open_clip: ClassVar[bool] = True
    takes_activation: ClassVar[bool] = True
    own_activation: ClassVar[bool] = True
    unused: ClassVar[tuple[Unused, ...]] = (
        *TextTowerConfig.unused,
        Unused("pretrained", lambda text: text.name is None, "on a text tower without an encoder of Hugging Face's"),
    )

    def build(self, model: ModelConfig, own_weights: bool = False) -> "nn.Module":
        from clip_exp.models.families.open_clip.towers import build_text_tower  # imports torch

        return build_text_tower(self, model, own_weights)

    def fits(self, model: ModelConfig, at: str) -> Iterator[str]:
        if not isinstance(model.image, OpenCLIPImageConfig):  # otherwise the image tower reports it
            yield from _both_towers(model, at)

    def prefix_in_open_clip(self, model: ModelConfig) -> str:
        return "text." if has_text_below(open_clip_values(model.open_clip_name)) else ""

    def tokenizer_problems(self, where: str, tokenizer: Any) -> Iterator[str]:
        if self.name is not None:
            yield from super().tokenizer_problems(where, tokenizer)
        else:
            yield from self.embedding_problems(where, tokenizer, self.vocab_size)

    def training_problems(self, model: ModelConfig) -> Iterator[str]:
        if self.trim and not can_be_trimmed(open_clip_values(model.open_clip_name)["text_cfg"]):
            yield (
                f"model.text.trim=true would change the features of model.name={model.open_clip_name}, whose texts must be padded to the "
                "whole context: leave it out."
            )

    def open_clip_cfg(self, model: ModelConfig) -> dict[str, Any]:
        return _cfg(model, "text_cfg", context_length=self.context_length)
