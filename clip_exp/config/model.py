"""The schema of a model: two towers, what they take in, and the space that they share; and what makes one impossible."""

from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field, JsonValue

from clip_exp.config.base import Config, Float, Positive, Proportion, Size, Unused, exactly
from clip_exp.open_clip_files import can_be_trimmed, open_clip_values

VOCABULARY = 49408  # of OpenAI's byte-pair encoding


class Activation(StrEnum):
    """Nonlinearity of the towers' MLPs. OpenAI's weights need `quick_gelu`, x * sigmoid(1.702 x)."""

    gelu = "gelu"
    quick_gelu = "quick_gelu"
    gelu_tanh = "gelu_tanh"


class ImageTower(StrEnum):
    """Kinds of image towers: CLIP's own Vision Transformer and ResNet, SigLIP's, or one from another library."""

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
    """Kinds of text towers: CLIP's causal transformer, SigLIP's, or one from another library."""

    clip = "clip"
    siglip = "siglip"
    huggingface = "huggingface"
    open_clip = "open_clip"

    @property
    def foreign(self) -> bool:
        """Whether its modules are another library's."""
        return self in (TextTower.huggingface, TextTower.open_clip)


class Projection(StrEnum):
    """Maps from the channels of a foreign tower to the shared space."""

    linear = "linear"
    mlp = "mlp"
    none = "none"


class Pooler(StrEnum):
    """Ways from a Hugging Face encoder's tokens to one vector: their mean, the first, or the encoder's own pooler."""

    mean = "mean"
    cls = "cls"
    own = "own"


class Cleaning(StrEnum):
    """Treatments of a text before a tokenizer of the `tokenizers` library, by open_clip's names."""

    whitespace = "whitespace"
    lower = "lower"  # type: ignore[assignment] # open_clip's name, though a str has a method of that name
    canonicalize = "canonicalize"


class Interpolation(StrEnum):
    """Interpolations of images in evaluation; training crops are always bicubic."""

    bicubic = "bicubic"
    bilinear = "bilinear"


class ResizeMode(StrEnum):
    """Ways to make an image square in evaluation: shorter side to size, then a center crop; or both sides to size."""

    shortest = "shortest"
    squash = "squash"


Std = Annotated[list[Positive], exactly(3)]
Mean = Annotated[list[Float], exactly(3)]
Blocks = Annotated[list[Size], exactly(4)]

# The kinds of towers that use a key; keys that are not here are used by all.
_OWN_IMAGE, _OWN_TEXT = (ImageTower.vit, ImageTower.siglip), (TextTower.clip, TextTower.siglip)
IMAGE_KEYS: dict[str, tuple[ImageTower, ...]] = {
    "patch_size": _OWN_IMAGE,
    "width": (*_OWN_IMAGE, ImageTower.resnet),
    "layers": _OWN_IMAGE,
    "stages": (ImageTower.resnet,),
    "heads": (*_OWN_IMAGE, ImageTower.resnet),
    "mlp_ratio": _OWN_IMAGE,
    "name": (ImageTower.timm,),
    "projection": (ImageTower.timm,),
}
TEXT_KEYS: dict[str, tuple[TextTower, ...]] = {
    "vocab_size": (*_OWN_TEXT, TextTower.open_clip),
    "width": _OWN_TEXT,
    "layers": _OWN_TEXT,
    "heads": _OWN_TEXT,
    "mlp_ratio": _OWN_TEXT,
    "architecture": (TextTower.huggingface, TextTower.open_clip),
    "pooler": (TextTower.huggingface,),
    "projection": (TextTower.huggingface,),
    "trim": (TextTower.clip, TextTower.huggingface, TextTower.open_clip),
}
TRANSFORMER = ("width", "layers", "heads")
IMAGE_NEEDS: dict[ImageTower, tuple[str, ...]] = {
    ImageTower.vit: ("patch_size", *TRANSFORMER),
    ImageTower.siglip: ("patch_size", *TRANSFORMER),
    ImageTower.resnet: ("stages", "width", "heads"),
    ImageTower.timm: ("name",),
    ImageTower.open_clip: (),
}
TEXT_NEEDS: dict[TextTower, tuple[str, ...]] = {
    TextTower.clip: TRANSFORMER,
    TextTower.siglip: (*TRANSFORMER, "tokenizer"),
    TextTower.huggingface: ("name",),
    TextTower.open_clip: (),
}


def _unused_by_kind(tower: str, uses: dict[str, Any]) -> Iterator[Unused]:
    for key, kinds in uses.items():
        yield Unused(key, _is_other(kinds), f"on {tower} towers of kind={{c.kind}}")


def _is_other(kinds: tuple[Any, ...]) -> Callable[[Any], bool]:
    return lambda tower: tower.kind not in kinds


class ImageTowerConfig(Config):
    """An image tower, and the images it expects. Which of the fields count depends on `kind`."""

    kind: ImageTower = Field(ImageTower.vit, description="vit, resnet, siglip, timm or open_clip")
    image_size: Size = Field(description="side of the square input, pixels")
    patch_size: Size | None = Field(None, description="side of a patch, pixels (vit, siglip)")
    width: Size | None = Field(
        None, description="channels of the residual stream (vit, siglip), or of the stem (resnet)"
    )
    layers: Size | None = Field(None, description="blocks (vit, siglip)")
    stages: Blocks | None = Field(None, description="blocks of each of the four stages (resnet)")
    heads: Size | None = Field(
        None, description="attention heads (vit, siglip), or heads of the attention pooling (resnet)"
    )
    mlp_ratio: Positive = Field(
        4.0, description="hidden channels of the MLP over width; rounded down to whole channels"
    )
    patch_dropout: Proportion = Field(
        0.0, description="fraction of the patches that a training step leaves out (Li et al. 2023, FLIP)"
    )
    name: str | None = Field(None, description="name of the backbone (timm)")
    pretrained: bool = Field(False, description="start from the backbone's own weights (timm)")
    projection: Projection = Field(
        Projection.linear, description="linear, mlp or none, from its channels to the shared space (timm)"
    )
    mean: Mean | None = Field(
        None, description="RGB, of pixels in 0..1; null: as the weights were trained, else OpenAI's"
    )
    std: Std | None = Field(
        None, description="RGB, of pixels in 0..1; null: as the weights were trained, else OpenAI's"
    )
    interpolation: Interpolation | None = Field(
        None, description="bicubic or bilinear; null: as the weights were trained, else bicubic"
    )
    resize_mode: ResizeMode | None = Field(
        None, description="shortest or squash; null: as the weights were trained, else shortest"
    )

    unused: ClassVar[tuple[Unused, ...]] = (*_unused_by_kind("image", IMAGE_KEYS),)

    def rules(self, at: str) -> Iterator[str]:
        missing = [name for name in IMAGE_NEEDS[self.kind] if getattr(self, name) is None]
        for name in missing:
            yield f"{at}{name} has no value, and image towers of kind={self.kind} need it: set it."
        if self.patch_dropout and self.kind is ImageTower.resnet:
            yield f"{at}patch_dropout={self.patch_dropout}: a resnet has no patches to leave out. Set it to 0."
        if missing:
            return
        if self.kind in _OWN_IMAGE:
            yield from _check_heads(at, self.width, self.heads)
            if self.image_size % (self.patch_size or 1):
                yield f"{at}image_size={self.image_size} must be a multiple of {at}patch_size={self.patch_size}."
        if self.kind is ImageTower.resnet:
            if self.image_size % 32:
                yield f"{at}image_size={self.image_size} must be a multiple of 32, which a resnet divides it by."
            if self.width and self.heads and 32 * self.width % self.heads:
                yield (
                    f"{at}heads={self.heads} must divide {32 * self.width}, the channels that a resnet of {at}width={self.width} pools."
                )


class TextTowerConfig(Config):
    """A text tower, and the tokens it expects. Which of the fields count depends on `kind`."""

    kind: TextTower = Field(TextTower.clip, description="clip, siglip, huggingface or open_clip")
    context_length: Annotated[Size, Field(ge=3)] = Field(
        77, description="tokens, start and end included; longer captions are cut, the end token kept"
    )
    vocab_size: Size = Field(VOCABULARY, description="tokens that there are (clip, siglip)")
    width: Size | None = Field(None, description="channels of the residual stream (clip, siglip)")
    layers: Size | None = Field(None, description="blocks (clip, siglip)")
    heads: Size | None = Field(None, description="attention heads (clip, siglip)")
    mlp_ratio: Positive = Field(
        4.0, description="hidden channels of the MLP over width; rounded down to whole channels"
    )
    name: str | None = Field(None, description="name of an encoder on the hub, or a folder of one (huggingface)")
    pretrained: bool = Field(True, description="start from the encoder's own weights (huggingface)")
    architecture: dict[str, JsonValue] = Field({}, description="the encoder's own configuration, noted by training")
    pooler: Pooler = Field(
        Pooler.mean, description="mean of the tokens, cls (the first), or own (the encoder's pooler) (huggingface)"
    )
    projection: Projection = Field(
        Projection.mlp, description="linear, mlp or none, from its channels to the shared space (huggingface)"
    )
    tokenizer: str | None = Field(
        None, description="name on the hub, or a folder; null: the encoder's own, elsewhere OpenAI's"
    )
    cleaning: Cleaning = Field(
        Cleaning.whitespace, description="whitespace, lower or canonicalize, before a `tokenizer`; OpenAI's has its own"
    )
    strip_sep_token: bool = Field(
        False, description="zeros in the place of the tokenizer's separators, as CLIPA's weights expect"
    )
    trim: bool = Field(
        True,
        description="cut a batch to its longest text; not where that would change features (siglip; others of open_clip)",
    )

    unused: ClassVar[tuple[Unused, ...]] = (
        *_unused_by_kind("text", TEXT_KEYS),
        Unused(
            "cleaning strip_sep_token",
            lambda text: text.uses_openai_tokenizer,
            "on OpenAI's tokenizer",
            "leave it out, or set {at}tokenizer",
        ),
    )

    @property
    def uses_openai_tokenizer(self) -> bool:
        """Whether captions are split by OpenAI's tokenizer, which the package carries."""
        return self.tokenizer is None and self.kind in (TextTower.clip, TextTower.open_clip)

    def rules(self, at: str) -> Iterator[str]:
        missing = [name for name in TEXT_NEEDS[self.kind] if getattr(self, name) is None]
        for name in missing:
            yield f"{at}{name} has no value, and text towers of kind={self.kind} need it: set it."
        if not missing and self.kind in _OWN_TEXT:
            yield from _check_heads(at, self.width, self.heads)


class ModelConfig(Config):
    """Two towers and the space that they share."""

    name: str = Field(description="name of the model, for folders and reports")
    embed_dim: Size = Field(description="channels of the shared space")
    image: ImageTowerConfig
    text: TextTowerConfig
    activation: Activation | None = Field(
        None,
        description="gelu, quick_gelu or gelu_tanh in the MLPs of transformers; null: the one that the weights were trained with, else gelu",
    )
    dropout: Proportion = Field(0.0, description="on the residual branches of transformers; a resnet has none")
    open_clip_name: str | None = Field(
        None, description="name of the same architecture in open_clip: `pretrained` knows its tags"
    )

    unused: ClassVar[tuple[Unused, ...]] = (
        Unused(
            "image.pretrained",
            lambda model: model.backbone is None,
            "on image towers of kind={c.image.kind} without a backbone of timm",
            "weights of a whole model are pretrained=…",
        ),
        Unused(
            "text.name text.pretrained",
            lambda model: not model.has_encoder,
            "on a text tower without an encoder of Hugging Face's",
        ),
        Unused(
            "activation",
            lambda model: not model.uses_activation,
            "on towers of kind={c.image.kind} and kind={c.text.kind}, which have their own",
        ),
    )

    @property
    def has_foreign_tower(self) -> bool:
        return self.image.kind.foreign or self.text.kind.foreign

    @property
    def has_encoder(self) -> bool:
        """Whether the text tower is an encoder of Hugging Face's."""
        if self.text.kind is TextTower.open_clip:
            return "hf_model_name" in open_clip_values(self.open_clip_name)["text_cfg"]
        return self.text.kind is TextTower.huggingface

    @property
    def backbone(self) -> str | None:
        """Name of the image tower's backbone in timm."""
        if self.image.kind is ImageTower.timm:
            return self.image.name
        if self.image.kind is ImageTower.open_clip:
            return open_clip_values(self.open_clip_name)["vision_cfg"].get("timm_model_name")
        return None

    @property
    def has_own_mlp(self) -> bool:
        """Whether a tower is clip_exp's own, with `activation` in its MLPs; those of timm and Hugging Face have theirs."""
        return self.image.kind in _OWN_IMAGE or self.text.kind in _OWN_TEXT

    @property
    def uses_activation(self) -> bool:
        """Whether `activation` changes the model: open_clip's architectures allow another in the place of their own."""
        return self.has_own_mlp or self.image.kind is ImageTower.open_clip

    @property
    def own_towers(self) -> set[str]:
        """Which of the towers, `image` and `text`, start from the weights of their own library."""
        image = self.image.pretrained and self.backbone is not None
        text = self.text.pretrained and self.has_encoder
        return {tower for tower, own in (("image", image), ("text", text)) if own}

    def rules(self, at: str) -> Iterator[str]:
        if self.image.kind is ImageTower.siglip and self.image.width != self.embed_dim:
            yield (
                f"{at}embed_dim={self.embed_dim} must be {at}image.width={self.image.width}: a siglip image tower ends "
                "without a projection."
            )
        if (self.image.kind is ImageTower.open_clip) != (self.text.kind is TextTower.open_clip):
            yield f"{at}image.kind=open_clip and {at}text.kind=open_clip go together: use model=open_clip model.name=…"


def check_tokens(model: ModelConfig) -> Iterator[str]:
    """Yield why texts cannot be trained on: not as short as a batch allows, or with tokens that have no embedding.

    Published weights may have either: a model that is only used is not checked.
    """
    text = model.text
    if text.kind is TextTower.clip and text.tokenizer is None and text.vocab_size < VOCABULARY:
        yield f"model.text.vocab_size={text.vocab_size} must be at least {VOCABULARY}, the tokens there are."
    if (
        text.kind is TextTower.open_clip
        and text.trim
        and not can_be_trimmed(open_clip_values(model.open_clip_name)["text_cfg"])
    ):
        yield (
            f"model.text.trim=true would change the features of model.name={model.open_clip_name}, whose texts need the whole "
            "context: leave it out."
        )


def _check_heads(at: str, width: int | None, heads: int | None) -> Iterator[str]:
    if width and heads and width % heads:
        yield f"{at}width={width} must be a multiple of {at}heads={heads}."


def folder_or_hub_name(name: str) -> str:
    """Return what Hugging Face's `from_pretrained` takes: a folder that is here, or a name on the hub, which has at most one slash.

    Raises:
        FileNotFoundError: it can only be a folder, and is not there.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return str(folder)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError("there is no such folder")
    return name
