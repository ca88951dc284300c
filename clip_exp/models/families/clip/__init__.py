"""Towers of OpenAI's CLIP (Radford et al. 2021): Vision Transformer, ResNet and a causal text transformer."""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from clip_exp.config.base import Config, Positive, Proportion, Size, exactly
from clip_exp.config.model import (
    VOCABULARY,
    Activation,
    Cleaning,
    ImageTowerConfig,
    ModelConfig,
    TextTowerConfig,
)
from clip_exp.renaming import KERNEL, TRANSPOSED, Names, Row

if TYPE_CHECKING:
    from torch import Tensor, nn

HEAD_WIDTH, MLP_RATIO = 64, 4.0  # defaults of open_clip's configurations
RESNET_STRIDE = 32  # pixels per cell of a ResNet's last feature map, along a side
OPEN_CLIP_BLOCK = (
    Row(".blocks.", ".resblocks."),
    Row(".attention.qkv.", ".attn.in_proj_"),
    Row(".attention.out.", ".attn.out_proj."),
    Row(".mlp.fc.", ".mlp.c_fc."),
    Row(".mlp.proj.", ".mlp.c_proj."),
)
TRANSFORMERS_BLOCK = (
    Row(".ln_1.", ".layer_norm1."),
    Row(".ln_2.", ".layer_norm2."),
    Row(".attention.qkv.", (".self_attn.q_proj.", ".self_attn.k_proj.", ".self_attn.v_proj.")),
    Row(".attention.out.", ".self_attn.out_proj."),
    Row(".mlp.fc.", ".mlp.fc1."),
    Row(".mlp.proj.", ".mlp.fc2."),
)


class TransformerConfig(Config):
    """Configuration keys of towers that are transformers of clip_exp."""

    width: Size = Field(description="channels of the residual stream")
    layers: Size = Field(description="number of blocks")
    heads: Size = Field(description="number of attention heads")
    mlp_ratio: Positive = Field(
        MLP_RATIO, description="ratio of the hidden channels of the MLP to width; the product is rounded down"
    )

    def rules(self, at: str) -> Iterator[str]:
        yield from super().rules(at)
        if self.width % self.heads:
            yield f"{at}width={self.width} must be a multiple of {at}heads={self.heads}."

    def transformer(self, model: ModelConfig) -> dict[str, Any]:
        """Return the arguments of `clip_exp.models.layers.Transformer`."""
        return {
            "width": self.width,
            "layers": self.layers,
            "heads": self.heads,
            "mlp_ratio": self.mlp_ratio,
            "activation": model.activation or Activation.gelu,
            "dropout": model.dropout,
        }

    def open_clip_transformer(self, model: ModelConfig) -> dict[str, Any]:
        """Return the values in open_clip's configuration that differ from its defaults."""
        ratio = {} if self.mlp_ratio == MLP_RATIO else {"mlp_ratio": self.mlp_ratio}
        return {**ratio, **open_clip_activation(model)}


class PatchTransformerConfig(TransformerConfig, ImageTowerConfig):
    """Configuration keys of image towers that are transformers over patches."""

    patch_size: Size = Field(description="side of a patch in pixels")
    patch_dropout: Proportion = Field(
        0.0, description="fraction of the patches that are dropped in training (FLIP, Li et al. 2023)"
    )

    takes_activation: ClassVar[bool] = True
    architecture_keys: ClassVar[tuple[str, ...]] = ("patch_size", "width", "layers", "heads")

    def rules(self, at: str) -> Iterator[str]:
        yield from super().rules(at)
        if self.image_size % self.patch_size:
            yield f"{at}image_size={self.image_size} must be a multiple of {at}patch_size={self.patch_size}."

    def patch_transformer(self, model: ModelConfig) -> dict[str, Any]:
        """Return the arguments of the tower, except `embed_dim`."""
        own = {"image_size": self.image_size, "patch_size": self.patch_size, "patch_dropout": self.patch_dropout}
        return own | self.transformer(model)

    @classmethod
    def numbers(cls, state: "Mapping[str, Tensor]") -> dict[str, Any]:
        found: dict[str, Any] = {"layers": count_blocks(state)}
        if (patches := state.get("patch_embedding.weight")) is not None:
            found |= {"width": patches.shape[0], "patch_size": math.isqrt(patches[0].numel() // 3)}
        if patches is not None and (positions := state.get("positional_embedding")) is not None:
            found["image_size"] = math.isqrt(positions.shape[-2]) * found["patch_size"]
        return {key: value for key, value in found.items() if value}


class TokenTransformerConfig(TransformerConfig, TextTowerConfig):
    """Configuration keys of text towers that are transformers over tokens."""

    vocab_size: Size = Field(VOCABULARY, description="number of tokens in the vocabulary")

    takes_activation: ClassVar[bool] = True
    architecture_keys: ClassVar[tuple[str, ...]] = ("vocab_size", "width", "layers", "heads")

    def token_transformer(self, model: ModelConfig) -> dict[str, Any]:
        """Return the arguments of the tower."""
        own = {"context_length": self.context_length, "vocab_size": self.vocab_size, "embed_dim": model.embed_dim}
        return own | self.transformer(model)

    def tokenizer_problems(self, where: str, tokenizer: Any) -> Iterator[str]:
        yield from self.embedding_problems(where, tokenizer, self.vocab_size)

    def open_clip_cfg(self, model: ModelConfig) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in ("context_length", "vocab_size", "width", "heads", "layers")}
        return {**values, **self.open_clip_transformer(model), **open_clip_tokenizer(self)}

    @classmethod
    def numbers(cls, state: "Mapping[str, Tensor]") -> dict[str, Any]:
        found: dict[str, Any] = {"layers": count_blocks(state)}
        if (tokens := state.get("token_embedding.weight")) is not None:
            found["vocab_size"], found["width"] = tokens.shape
        if (positions := state.get("positional_embedding")) is not None:
            found["context_length"] = positions.shape[-2]
        if (projection := state.get("projection.weight")) is not None:
            found["embed_dim"] = projection.shape[0]
        return {key: value for key, value in found.items() if value}


class ViTConfig(PatchTransformerConfig):
    """Vision Transformer that pools at its class token (Dosovitskiy et al. 2021, with CLIP's changes)."""

    kind: Literal["vit"] = "vit"

    is_default: ClassVar[bool] = True
    in_open_clip: ClassVar[bool] = True
    names: ClassVar[dict[str, Names]] = {
        "clip_exp": Names((), ("class_embedding",)),
        "open_clip": Names(
            (
                Row("patch_embedding.", "conv1.", KERNEL),
                Row("projection.weight", "proj", TRANSPOSED),
                *OPEN_CLIP_BLOCK,
            ),
            ("class_embedding",),
        ),
        "transformers": Names(
            (
                Row("class_embedding", "vision_model.embeddings.class_embedding"),
                Row("patch_embedding.", "vision_model.embeddings.patch_embedding.", KERNEL),
                Row("positional_embedding", "vision_model.embeddings.position_embedding.weight"),
                Row("ln_pre.", "vision_model.pre_layrnorm."),
                Row("transformer.blocks.", "vision_model.encoder.layers."),
                Row("ln_post.", "vision_model.post_layernorm."),
                Row("projection.", "visual_projection."),
                *TRANSFORMERS_BLOCK,
            ),
            ("vision_model.embeddings.class_embedding",),
        ),
    }

    def build(self, model: ModelConfig, own_weights: bool = False) -> "nn.Module":
        from clip_exp.models.families.clip.vit import VisionTransformer  # imports torch

        return VisionTransformer(embed_dim=model.embed_dim, **self.patch_transformer(model))

    def open_clip_cfg(self, model: ModelConfig) -> dict[str, Any]:
        numbers = {"layers": self.layers, "patch_size": self.patch_size, **self.open_clip_transformer(model)}
        return {"image_size": self.image_size, "width": self.width, **numbers, **head_width(self.width // self.heads)}


class ResNetConfig(ImageTowerConfig):
    """ResNet with attention pooling (He et al. 2016, with CLIP's changes)."""

    kind: Literal["resnet"] = "resnet"
    stages: Annotated[list[Size], exactly(4)] = Field(description="number of blocks in each of the four stages")
    width: Size = Field(description="channels of the stem")
    heads: Size = Field(description="number of heads of the attention pooling")

    in_open_clip: ClassVar[bool] = True
    architecture_keys: ClassVar[tuple[str, ...]] = ("stages", "width", "heads")
    names: ClassVar[dict[str, Names]] = {
        "clip_exp": Names((), ("stem.",)),
        "open_clip": Names(
            (
                *(Row(f"stem.{kind}{i}.", f"{kind}{i}.") for kind in ("conv", "bn") for i in (1, 2, 3)),
                *(Row(f"stages.{i}.", f"layer{i + 1}.") for i in range(4)),
                Row("pool.positional_embedding", "attnpool.positional_embedding"),
                Row("pool.attention.q.", "attnpool.q_proj."),
                Row("pool.attention.key_", "attnpool.k_proj."),
                Row("pool.attention.value_", "attnpool.v_proj."),
                Row("pool.attention.out.", "attnpool.c_proj."),
                Row(".shortcut.conv.", ".downsample.0."),
                Row(".shortcut.bn.", ".downsample.1."),
            ),
            ("layer1.",),
        ),
    }

    def rules(self, at: str) -> Iterator[str]:
        yield from super().rules(at)
        if self.image_size % RESNET_STRIDE:
            yield f"{at}image_size={self.image_size} must be a multiple of 32, the stride of a resnet."
        if 32 * self.width % self.heads:
            yield f"{at}heads={self.heads} must divide {32 * self.width}, the channels of the last feature map with {at}width={self.width}."

    def build(self, model: ModelConfig, own_weights: bool = False) -> "nn.Module":
        from clip_exp.models.families.clip.resnet import ModifiedResNet  # imports torch

        return ModifiedResNet(
            image_size=self.image_size,
            stages=self.stages,
            width=self.width,
            heads=self.heads,
            embed_dim=model.embed_dim,
        )

    def open_clip_cfg(self, model: ModelConfig) -> dict[str, Any]:
        numbers = {"width": self.width, "layers": self.stages, "patch_size": None}
        return {"image_size": self.image_size, **numbers, **head_width(32 * self.width // self.heads)}

    @classmethod
    def numbers(cls, state: "Mapping[str, Tensor]") -> dict[str, Any]:
        blocks = {(int(i), j) for name in state for i, j in re.findall(r"^stages\.(\d+)\.(\d+)\.", name)}
        count = Counter(stage for stage, _ in blocks)
        found: dict[str, Any] = {"stages": [count[stage] for stage in sorted(count)]}
        if (stem := state.get("stem.conv1.weight")) is not None:
            found["width"] = 2 * stem.shape[0]
        if (positions := state.get("pool.positional_embedding")) is not None:
            found["image_size"] = math.isqrt(positions.shape[-2]) * RESNET_STRIDE
        return {key: value for key, value in found.items() if value}


class CLIPTextConfig(TokenTransformerConfig):
    """Causal transformer that pools at the end-of-text token, which has the highest id (Radford et al. 2021, section 2.4)."""

    kind: Literal["clip"] = "clip"
    trim: bool = Field(True, description="trim each batch to its longest text; features do not change")

    is_default: ClassVar[bool] = True
    in_open_clip: ClassVar[bool] = True
    open_clip_prefix: ClassVar[str] = ""
    names: ClassVar[dict[str, Names]] = {
        "clip_exp": Names((), ("token_embedding.",)),
        "open_clip": Names(
            (Row("projection.weight", "text_projection", TRANSPOSED), *OPEN_CLIP_BLOCK), ("token_embedding.",)
        ),
        "transformers": Names(
            (
                Row("token_embedding.", "text_model.embeddings.token_embedding."),
                Row("positional_embedding", "text_model.embeddings.position_embedding.weight"),
                Row("transformer.blocks.", "text_model.encoder.layers."),
                Row("ln_final.", "text_model.final_layer_norm."),
                Row("projection.", "text_projection."),
                *TRANSFORMERS_BLOCK,
            ),
            ("text_model.embeddings.token_embedding.",),
        ),
    }

    @property
    def trims(self) -> bool:
        return self.trim

    def build(self, model: ModelConfig, own_weights: bool = False) -> "nn.Module":
        from clip_exp.models.families.clip.text import TextTransformer  # imports torch

        return TextTransformer(**self.token_transformer(model))

    def tokenizer_problems(self, where: str, tokenizer: Any) -> Iterator[str]:
        yield from super().tokenizer_problems(where, tokenizer)
        if tokenizer("a").input_ids[-1] != (highest := max(tokenizer.get_vocab().values())):
            yield (
                f"{where} does not end texts with its highest id, {highest}, which model.text.kind=clip needs to find the end of a "
                "text: use it with model/text=huggingface or a SigLIP text tower."
            )

    def training_problems(self, model: ModelConfig) -> Iterator[str]:
        if self.tokenizer is None and self.vocab_size < VOCABULARY:
            yield f"model.text.vocab_size={self.vocab_size} must be at least {VOCABULARY}, the size of the tokenizer's vocabulary."


def count_blocks(state: "Mapping[str, Tensor]") -> int:
    return len({found[1] for name in state if (found := re.match(r"transformer\.blocks\.(\d+)\.", name))})


def head_width(width: int) -> dict[str, Any]:
    """Return open_clip's key for the width of a head if it is not the default."""
    return {} if width == HEAD_WIDTH else {"head_width": width}


def open_clip_activation(model: ModelConfig) -> dict[str, Any]:
    """Return open_clip's keys for an activation other than GELU and QuickGELU."""
    return {"act_kwargs": {"approximate": "tanh"}} if model.activation is Activation.gelu_tanh else {}


def open_clip_tokenizer(text: TextTowerConfig) -> dict[str, Any]:
    """Return open_clip's keys for a tokenizer other than OpenAI's; only its name, since the export contains the files."""
    if text.tokenizer is None:
        return {}
    name = Path(text.tokenizer).name if Path(text.tokenizer).is_dir() else text.tokenizer
    cleaned = {} if text.cleaning is Cleaning.whitespace else {"clean": text.cleaning.value}
    stripped = {"strip_sep_token": True} if text.strip_sep_token else {}
    return {"hf_tokenizer_name": name, "tokenizer_kwargs": {**cleaned, **stripped}}
