"""Configuration of towers that are the user's own modules, named by `_target_`, with a projection to the shared space."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from clip_exp.config.base import Size, Target
from clip_exp.config.model import VOCABULARY, ImageTowerConfig, ModelConfig, Projection, TextTowerConfig

if TYPE_CHECKING:
    from torch import nn

ADDED = Field(
    Projection.linear,
    description="projection from the module's channels to the shared space: linear, mlp or none (the module has embed_dim channels)",
)


class CustomImageConfig(ImageTowerConfig, Target):
    """Module from normalized images [B, 3, image_size, image_size] to features [B, channels]."""

    kind: Literal["custom"] = "custom"
    target: str = Field(
        alias="_target_", description="full name of the module's class, or of a function that returns a module"
    )
    image_size: Size = Field(224, description="side of the square input image, pixels")
    projection: Projection = ADDED

    foreign: ClassVar[bool] = True
    optional: ClassVar[tuple[str, ...]] = ("image_size", "embed_dim")

    def build(self, model: ModelConfig, own_weights: bool = False) -> "nn.Module":
        import torch

        from clip_exp.models.families.custom.tower import build_tower

        return build_tower(self, "model.image", model, (3, self.image_size, self.image_size), torch.float32)


class CustomTextConfig(TextTowerConfig, Target):
    """Module from token ids [B, L] to features [B, channels]."""

    kind: Literal["custom"] = "custom"
    target: str = Field(
        alias="_target_", description="full name of the module's class, or of a function that returns a module"
    )
    vocab_size: Size = Field(VOCABULARY, description="number of token ids that the module embeds")
    trim: bool = Field(
        False,
        description="trim each batch to its longest text; only for a module whose features do not depend on the padding after a text",
    )
    projection: Projection = ADDED

    foreign: ClassVar[bool] = True
    optional: ClassVar[tuple[str, ...]] = ("context_length", "vocab_size", "embed_dim")

    @property
    def trims(self) -> bool:
        return self.trim

    def tokenizer_problems(self, where: str, tokenizer: Any) -> Iterator[str]:
        yield from self.embedding_problems(where, tokenizer, self.vocab_size)

    def build(self, model: ModelConfig, own_weights: bool = False) -> "nn.Module":
        import torch

        from clip_exp.models.families.custom.tower import build_tower

        return build_tower(self, "model.text", model, (self.context_length,), torch.int64)
