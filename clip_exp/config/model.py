"""The schema of a model: two towers and the space that they share, and what a family of towers tells about one (`clip_exp.models.families`)."""

from collections.abc import Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from pydantic import Field

from clip_exp.config.base import Config, Float, Member, Positive, Proportion, Size, Unused, exactly
from clip_exp.renaming import Names

if TYPE_CHECKING:
    from torch import Tensor, nn

VOCABULARY = 49408  # of OpenAI's byte-pair encoding
HERE = "."  # as the tokenizer of an exported model: in the folder of its file


class Activation(StrEnum):
    """Nonlinearity of the towers' MLPs. OpenAI's weights need `quick_gelu`, x * sigmoid(1.702 x)."""

    gelu = "gelu"
    quick_gelu = "quick_gelu"
    gelu_tanh = "gelu_tanh"


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


class Tower(Member):
    """Base of both kinds of towers: what a family tells about a tower, beside its fields.

    The base of the group says what holds for a tower that is nobody's but the user's; a family overrides what differs.
    """

    key: ClassVar[str] = "kind"
    foreign: ClassVar[bool] = False  # its modules are another library's, under that library's names
    in_open_clip: ClassVar[bool] = False  # open_clip's configurations can describe it
    takes_activation: ClassVar[bool] = False  # `model.activation` changes it
    own_activation: ClassVar[bool] = False  # its library says which, where `model.activation` is null
    architecture_keys: ClassVar[
        tuple[str, ...]
    ] = ()  # fields that make other weights, or other numbers out of the same ones
    names: ClassVar[
        dict[str, Names]
    ] = {}  # its parameters in other libraries' files, by layout (`clip_exp.weights.names`), or by any name for files of one tower

    kind: str = Field(description="kind of tower")

    @property
    def own_weights(self) -> bool:
        """Whether it starts from the weights of its own library."""
        return False

    def build(self, model: "ModelConfig", own_weights: bool = False) -> "nn.Module":
        """Return the tower with fresh weights, from its input to [B, embed_dim].

        Args:
            own_weights: start from the weights of the tower's own library where `own_weights` says so; else nothing is fetched.

        Raises:
            ConfigError: numbers that do not fit each other, or a backbone or its weights that could not be loaded.
        """
        raise NotImplementedError

    def resolved(self, own_weights: bool) -> Self:
        """Return the tower with everything written out that its library knows, so that a run folder is opened without asking it.

        Args:
            own_weights: whether it starts from its library's weights; else weights of the whole model will be loaded.

        Raises:
            ConfigError: the library does not know it, or cannot be asked.
        """
        return self

    def as_resolved(self, earlier: "Tower") -> Self:
        """Return the tower with what `earlier`, the same one that was resolved before, has written out."""
        return self

    def portable(self) -> Self:
        """Return the tower as it is written into an export: it means the same on another machine."""
        return self

    def fits(self, model: "ModelConfig", at: str) -> Iterator[str]:
        """Yield why the tower cannot be one of the model's."""
        yield from ()

    def open_clip_cfg(self, model: "ModelConfig") -> dict[str, Any]:
        """Return `vision_cfg` or `text_cfg` with which open_clip builds the same tower, where its kind is `in_open_clip`."""
        raise NotImplementedError

    def open_clip_model(self, model: "ModelConfig") -> dict[str, Any]:
        """Return what open_clip's configuration of the whole model must say for this tower."""
        return {}

    def open_clip_problems(self, model: "ModelConfig") -> Iterator[str]:
        """Yield why this tower in particular has no `open_clip_cfg`, though its kind has one."""
        yield from ()

    @classmethod
    def numbers(cls, state: "Mapping[str, Tensor]") -> dict[str, Any]:
        """Return the fields that the shapes of a tower's weights tell.

        Args:
            state: weights by their names in the tower.
        """
        return {}


class ImageTowerConfig(Tower):
    """An image tower, and the images that it expects."""

    group: ClassVar[str] = "model/image"

    kind: str = Field(description="kind of image tower")
    image_size: Size = Field(description="side of the square input, pixels")
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


class TextTowerConfig(Tower):
    """A text tower, and the tokens that it expects."""

    group: ClassVar[str] = "model/text"
    openai_tokenizer: ClassVar[bool] = (
        True  # the tokenizer where `tokenizer` is null; else the tower has one of its own
    )
    sigmoid: ClassVar[bool] = False  # published with the bias of the sigmoid loss
    may_trim: ClassVar[bool] = False  # a batch may be cut to its longest text
    open_clip_prefix: ClassVar[str] = "text."  # of its names in open_clip's files

    kind: str = Field(description="kind of text tower")
    context_length: Annotated[Size, Field(ge=3)] = Field(
        77, description="tokens, start and end included; longer captions are cut, the end token kept"
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

    unused: ClassVar[tuple[Unused, ...]] = (
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
        return self.tokenizer is None and self.openai_tokenizer

    @property
    def tokenizer_source(self) -> str | None:
        """Folder of the tokenizer, or its name on the hub; None: OpenAI's, or nothing names one."""
        return self.tokenizer

    @property
    def trims(self) -> bool:
        """Whether a batch is cut to its longest text, which changes no feature; else it is as long as the context."""
        return self.may_trim

    def portable(self) -> Self:
        return self if self.uses_openai_tokenizer else self.model_copy(update={"tokenizer": HERE})

    def prefix_in_open_clip(self, model: "ModelConfig") -> str:
        """Return what the tower's names in open_clip's files begin with."""
        return self.open_clip_prefix

    def embedding_problems(self, where: str, tokenizer: Any, embedded: int) -> Iterator[str]:
        """Yield that a tokenizer has ids without an embedding.

        Args:
            embedded: number of ids that the tower embeds.
        """
        if (highest := max(tokenizer.get_vocab().values())) >= embedded:
            yield f"{where} has ids up to {highest}, and the text tower embeds {embedded}: give its own tokenizer."

    def tokenizer_problems(self, where: str, tokenizer: Any) -> Iterator[str]:
        """Yield why a tokenizer of transformers is not the tower's.

        Args:
            where: the key and its value, for messages.
        """
        yield from ()

    def training_problems(self, model: "ModelConfig") -> Iterator[str]:
        """Yield why texts cannot be trained on. Published weights may have such values: a model that is only used is not checked."""
        yield from ()


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
            "activation",
            lambda model: not model.uses_activation,
            "on towers of kind={c.image.kind} and kind={c.text.kind}, which have their own",
        ),
    )

    @property
    def towers(self) -> tuple[ImageTowerConfig, TextTowerConfig]:
        return self.image, self.text

    @property
    def has_foreign_tower(self) -> bool:
        return any(tower.foreign for tower in self.towers)

    @property
    def has_own_mlp(self) -> bool:
        """Whether a tower has `activation` in its MLPs, and no other where that is null."""
        return any(tower.takes_activation and not tower.own_activation for tower in self.towers)

    @property
    def uses_activation(self) -> bool:
        return any(tower.takes_activation for tower in self.towers)

    @property
    def own_towers(self) -> set[str]:
        """Which of the towers, `image` and `text`, start from the weights of their own library."""
        return {name for name, tower in zip(("image", "text"), self.towers, strict=True) if tower.own_weights}

    def rules(self, at: str) -> Iterator[str]:
        yield from self.image.fits(self, at)
        yield from self.text.fits(self, at)


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
