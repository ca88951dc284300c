"""Configuration of image towers that are backbones of the timm library (Wightman 2019) with a projection to the shared space."""

import difflib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, TypeVar

from pydantic import Field

from clip_exp.config.base import Proportion
from clip_exp.config.model import ImageTowerConfig, Interpolation, ModelConfig, Projection
from clip_exp.errors import ConfigError
from clip_exp.renaming import Names, Row, flax_vit

if TYPE_CHECKING:
    from torch import nn

T = TypeVar("T", bound=ImageTowerConfig)
KEY = "model.image.name"
QUICK = "_clip_quickgelu_"  # in timm's names of backbones with QuickGELU, for the weights of OpenAI and derived ones


class TimmConfig(ImageTowerConfig):
    """Backbone of timm with a projection."""

    kind: Literal["timm"] = "timm"
    name: str = Field(
        description="name of the backbone in timm.list_models(), optionally with a tag of its weights: vit_base_patch16_224.augreg_in21k"
    )
    pretrained: bool = Field(False, description="load the pretrained weights of the backbone")
    projection: Projection = Field(
        Projection.linear,
        description="projection from the backbone's channels to the shared space: linear, mlp or none",
    )
    patch_dropout: Proportion = Field(
        0.0, description="fraction of the patches that are dropped in training, if the backbone has patches"
    )

    in_open_clip: ClassVar[bool] = True
    foreign: ClassVar[bool] = True
    names: ClassVar[dict[str, Names]] = {
        "clip_exp": Names((), ("trunk.",)),
        "open_clip": Names(
            (
                Row("projection.weight", "head.proj.weight"),
                Row("projection.0.", "head.mlp.fc1."),
                Row("projection.2.", "head.mlp.fc2."),
            ),
            ("trunk.",),
        ),
        # Vision Transformers of big_vision, alone or as image tower of SigLIP.
        "big_vision": Names(
            flax_vit("pos_embedding", "LayerNorm_1", "MultiHeadDotProductAttention_0", "MlpBlock_0"),
            ("embedding.kernel",),
        ),
        # google-research/vision_transformer (ViT, "How to train your ViT"), where dropout layers count in the numbers of a block's parts.
        "vision_transformer": Names(
            flax_vit(
                "Transformer.posembed_input.pos_embedding",
                "LayerNorm_2",
                "MultiHeadDotProductAttention_1",
                "MlpBlock_3",
            ),
            ("embedding.kernel", "Transformer.posembed_input."),
        ),
    }

    @property
    def own_weights(self) -> bool:
        return self.pretrained

    def build(self, model: ModelConfig, own_weights: bool = False) -> "nn.Module":
        from clip_exp.models.families.timm.tower import build_tower  # imports torch

        return build_tower(self, model, own_weights)

    def resolved(self, own_weights: bool) -> Self:
        known_backbone(self.name)
        return as_trained(self, self.name) if own_weights and self.pretrained else self

    def open_clip_cfg(self, model: ModelConfig) -> dict[str, Any]:
        return {
            "image_size": self.image_size,
            "timm_model_name": self.name,
            "timm_model_pretrained": False,
            "timm_pool": "",  # that of the backbone
            "timm_proj": self.projection.value,
        }

    def open_clip_problems(self, model: ModelConfig) -> Iterator[str]:
        if self.projection is Projection.none:
            yield "format=open_clip does not support a timm backbone without a projection: use format=safetensors or onnx."


def known_backbone(name: str) -> str:
    """Check the name of a backbone, optionally with a tag of its weights (`vit_base_patch16_224.augreg_in21k`), and return it.

    Raises:
        ConfigError: timm has no backbone or weights of that name.
    """
    import timm

    if not timm.is_model(name):
        near = difflib.get_close_matches(name.partition(".")[0], timm.list_models(), n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "see timm.list_models() for the names."
        raise ConfigError(f"{KEY}={name} is not a model of timm: {hint}")
    try:
        timm.get_pretrained_cfg(name)
    except RuntimeError:
        raise ConfigError(f"{KEY}={name}: unknown weights '{name.partition('.')[2]}'. {tags_of(name)}") from None
    return name


def tags_of(name: str) -> str:
    """Return a sentence that lists the tags of a backbone's weights."""
    import timm

    if found := timm.list_pretrained(f"{name.partition('.')[0]}.*"):
        return f"timm has {', '.join(found)}."
    return "timm has no weights for this model: set model.image.pretrained=false."


def as_trained(image: T, backbone: str) -> T:
    """Return a tower with the preprocessing of a backbone's weights in timm, except for values that the configuration sets."""
    import timm

    trained = timm.get_pretrained_cfg(backbone)
    twin = backbone.replace("_clip_", QUICK)
    if QUICK not in backbone and any("quickgelu" in note for note in trained.notes or ()) and timm.is_model(twin):
        print(
            f"{backbone} uses gelu, but its weights were trained with quick_gelu: set model.image.name={twin}.",
            file=sys.stderr,
            flush=True,
        )
    interpolation = trained.interpolation if trained.interpolation in list(Interpolation) else Interpolation.bicubic
    return image.model_copy(
        update={
            "mean": image.mean or list(trained.mean),
            "std": image.std or list(trained.std),
            "interpolation": image.interpolation or Interpolation(interpolation),
        }
    )
