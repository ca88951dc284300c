"""The types and documentation of a model: two towers, what they take in, and the space that they share."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from clip_exp.config.missing import MISSING


class Activation(StrEnum):
    """Nonlinearity of the towers' MLPs. OpenAI's weights need `quick_gelu`, x * sigmoid(1.702 x)."""

    gelu = "gelu"
    quick_gelu = "quick_gelu"
    gelu_tanh = "gelu_tanh"


class ImageTower(StrEnum):
    """What an image tower is: CLIP's own Vision Transformer and ResNet, SigLIP's, or one from another library."""

    vit = "vit"
    resnet = "resnet"
    siglip = "siglip"
    timm = "timm"
    open_clip = "open_clip"

    @property
    def foreign(self) -> bool:
        """Whether its modules are another library's."""
        return self in (ImageTower.timm, ImageTower.open_clip)


class TextTower(StrEnum):
    """What a text tower is: CLIP's causal transformer, SigLIP's, or one from another library."""

    clip = "clip"
    siglip = "siglip"
    huggingface = "huggingface"
    open_clip = "open_clip"

    @property
    def foreign(self) -> bool:
        """Whether its modules are another library's."""
        return self in (TextTower.huggingface, TextTower.open_clip)


class Projection(StrEnum):
    """From the channels of a foreign tower to the shared space."""

    linear = "linear"
    mlp = "mlp"
    none = "none"


class Pooler(StrEnum):
    """How a Hugging Face encoder's tokens become one vector: their mean, the first, or the encoder's own pooler."""

    mean = "mean"
    cls = "cls"
    own = "own"


class Cleaning(StrEnum):
    """What happens to a text before a tokenizer of the `tokenizers` library, by open_clip's names."""

    whitespace = "whitespace"
    lower = "lower"  # type: ignore[assignment] # open_clip's name, though a str has a method of that name
    canonicalize = "canonicalize"


class Interpolation(StrEnum):
    """Of pictures in evaluation; training crops are always bicubic."""

    bicubic = "bicubic"
    bilinear = "bilinear"


class ResizeMode(StrEnum):
    """How evaluation makes a picture square: shorter side to size, then a center crop; or both sides to size."""

    shortest = "shortest"
    squash = "squash"


@dataclass
class ImageTowerConfig:
    """An image tower, and the pictures it expects. Which of the fields count depends on `kind`."""

    kind: ImageTower = ImageTower.vit
    image_size: int = MISSING  # side of the square input, pixels
    patch_size: int | None = None  # side of a patch, pixels (vit, siglip)
    width: int | None = None  # channels of the residual stream (vit, siglip), or of the stem (resnet)
    layers: int | None = None  # (vit, siglip)
    stages: list[int] | None = None  # blocks of each of the four stages (resnet)
    heads: int | None = None  # (vit, siglip), or of the attention pooling (resnet)
    mlp_ratio: float = 4.0  # hidden channels of the MLP over width; rounded down to whole channels
    patch_dropout: float = 0.0  # share of the patches that a training step leaves out (Li et al. 2023, FLIP)
    name: str | None = None  # of the backbone (timm)
    pretrained: bool = False  # start from the backbone's own weights (timm)
    projection: Projection = Projection.linear  # (timm)
    mean: list[float] | None = None  # RGB, of pixels in 0..1; null: as the weights were trained, else OpenAI's
    std: list[float] | None = None
    interpolation: Interpolation | None = None  # null: as the weights were trained, else bicubic
    resize_mode: ResizeMode | None = None  # null: as the weights were trained, else shortest


@dataclass
class TextTowerConfig:
    """A text tower, and the tokens it expects. Which of the fields count depends on `kind`."""

    kind: TextTower = TextTower.clip
    context_length: int = 77  # tokens, start and end included; longer captions are cut, the end token kept
    vocab_size: int = 49408  # (clip, siglip)
    width: int | None = None  # channels of the residual stream (clip, siglip)
    layers: int | None = None  # (clip, siglip)
    heads: int | None = None  # (clip, siglip)
    mlp_ratio: float = 4.0
    name: str | None = None  # of an encoder on the hub, or a folder of one (huggingface)
    pretrained: bool = True  # start from the encoder's own weights (huggingface)
    architecture: dict[str, Any] = field(default_factory=dict)  # the encoder's own configuration, noted by training
    pooler: Pooler = Pooler.mean  # (huggingface)
    projection: Projection = Projection.mlp  # (huggingface)
    tokenizer: str | None = None  # a name on the hub or a folder; null: the encoder's own, elsewhere OpenAI's
    cleaning: Cleaning = Cleaning.whitespace  # before a `tokenizer`; OpenAI's has its own
    strip_sep_token: bool = False  # zeros in the place of the tokenizer's separators, as CLIPA's weights expect
    trim: bool = (
        True  # a batch is cut to its longest text; not where that would change features (siglip; others of open_clip)
    )


@dataclass
class ModelConfig:
    name: str = MISSING
    embed_dim: int = MISSING  # channels of the shared space
    image: ImageTowerConfig = field(default_factory=ImageTowerConfig)
    text: TextTowerConfig = field(default_factory=TextTowerConfig)
    # Of the MLPs of transformers; a resnet and the towers of timm and Hugging Face have their own.
    activation: Activation | None = None  # null: the one that the weights were trained with, else gelu
    dropout: float = 0.0  # on the residual branches of transformers; a resnet has none
    open_clip_name: str | None = None  # of the same architecture there: `pretrained` knows its tags

    @property
    def has_foreign_tower(self) -> bool:
        return self.image.kind.foreign or self.text.kind.foreign
