"""Schema of a model: two towers and their shared embedding space. Each family of towers (`clip_exp.models.families`) subclasses `Tower`."""

from collections.abc import Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from pydantic import Field

from clip_exp.config.base import Config, Float, Member, Positive, Proportion, Size, Unused, exactly
from clip_exp.renaming import Names

if TYPE_CHECKING:
    from torch import Tensor, nn

TOWERS = ("image", "text")
# Size of the vocabulary of OpenAI's byte-pair encoding
VOCABULARY = 49408
# Value of `tokenizer` in an exported model: the tokenizer is in the same folder
HERE = "."


class Activation(StrEnum):
    """Activation functions of the towers' MLPs. OpenAI's weights need `quick_gelu`, x * sigmoid(1.702 x)."""

    gelu = "gelu"
    quick_gelu = "quick_gelu"
    gelu_tanh = "gelu_tanh"


class Projection(StrEnum):
    """Projections from the output of another library's tower to the shared embedding space."""

    linear = "linear"
    mlp = "mlp"
    none = "none"


class Pooler(StrEnum):
    """Pooling of a Hugging Face encoder's tokens: their mean, the first token, or the encoder's own pooler."""

    mean = "mean"
    cls = "cls"
    own = "own"


class Cleaning(StrEnum):
    """Text normalization before a tokenizer of the `tokenizers` library, by open_clip's names."""

    whitespace = "whitespace"
    lower = "lower"  # type: ignore[assignment] # overrides a method of str
    canonicalize = "canonicalize"


class Interpolation(StrEnum):
    """Interpolation modes for resizing images in evaluation; training always uses bicubic interpolation."""

    bicubic = "bicubic"
    bilinear = "bilinear"


class ResizeMode(StrEnum):
    """Resizing of images to a square in evaluation.

    `shortest` resizes the shorter side and takes the center crop; `squash` resizes both sides.
    """

    shortest = "shortest"
    squash = "squash"


Std = Annotated[list[Positive], exactly(3)]
Mean = Annotated[list[Float], exactly(3)]


class Tower(Member):
    """Base class of towers. Besides the fields, a family declares how its towers are built, loaded and exported.

    The defaults suit a custom tower; a family overrides what differs.

    Attributes:
        foreign: the modules are those of another library, under that library's names.
        in_open_clip: open_clip's configurations can describe the tower.
        takes_activation: `model.activation` has an effect on the tower.
        own_activation: the tower's library defines the activation if `model.activation` is null.
        architecture_keys: fields that change the weights' shapes, or the output for the same weights.
        names: names of the parameters in files of other libraries, by layout (`clip_exp.weights.names`), or by any name
            for files of one tower.
    """

    key: ClassVar[str] = "kind"
    foreign: ClassVar[bool] = False
    in_open_clip: ClassVar[bool] = False
    takes_activation: ClassVar[bool] = False
    own_activation: ClassVar[bool] = False
    architecture_keys: ClassVar[tuple[str, ...]] = ()
    names: ClassVar[dict[str, Names]] = {}

    kind: str = Field(description="kind of tower")

    @property
    def own_weights(self) -> bool:
        """True if the tower starts from weights of its own library, such as timm."""
        return False

    def build(self, model: "ModelConfig", own_weights: bool = False) -> "nn.Module":
        """Build the tower, a module from its input to [B, embed_dim].

        Args:
            model: model that the tower is part of.
            own_weights: load the weights of the tower's own library if the property `own_weights` is True. Otherwise,
                the weights are random and nothing is downloaded.

        Raises:
            ConfigError: values do not fit each other, or a backbone or its weights could not be loaded.
        """
        raise NotImplementedError

    def resolved(self, own_weights: bool) -> Self:
        """Return the tower with all values that its library defines, so that a run folder can be opened without the library.

        Args:
            own_weights: whether the tower starts from weights of its own library; if False, weights of the whole model
                will be loaded.

        Raises:
            ConfigError: the tower is unknown to the library, or the library is not available.
        """
        return self

    def as_resolved(self, earlier: "Tower") -> Self:
        """Return the tower with the values of `earlier`, the same tower after `resolved`."""
        return self

    def portable(self) -> Self:
        """Return the tower as it is written to an export, without paths of this machine."""
        return self

    def fits(self, model: "ModelConfig", at: str) -> Iterator[str]:
        """Yield an error message for every reason why the tower does not fit the model."""
        yield from ()

    def open_clip_cfg(self, model: "ModelConfig") -> dict[str, Any]:
        """Return `vision_cfg` or `text_cfg` of the same tower in open_clip. Only for towers with `in_open_clip`."""
        raise NotImplementedError

    def open_clip_model(self, model: "ModelConfig") -> dict[str, Any]:
        """Return the top-level entries of open_clip's model configuration that this tower requires."""
        return {}

    def open_clip_problems(self, model: "ModelConfig") -> Iterator[str]:
        """Yield an error message for every reason why open_clip cannot represent this tower, although it has `in_open_clip`."""
        yield from ()

    @classmethod
    def numbers(cls, state: "Mapping[str, Tensor]") -> dict[str, Any]:
        """Return the fields that can be inferred from the shapes of a tower's weights.

        Args:
            state: weights by their names in the tower.
        """
        return {}


class ImageTowerConfig(Tower):
    """Base class of image towers, with the preprocessing of the images."""

    group: ClassVar[str] = "model/image"

    kind: str = Field(description="kind of image tower")
    image_size: Size = Field(description="side of the square input image, pixels")
    mean: Mean | None = Field(
        None,
        description="mean of the RGB channels for pixels in 0..1; null: the mean that the weights were trained with, else OpenAI's",
    )
    std: Std | None = Field(
        None,
        description="standard deviation of the RGB channels for pixels in 0..1; null: as the weights were trained with, else OpenAI's",
    )
    interpolation: Interpolation | None = Field(
        None,
        description="interpolation of images in evaluation: bicubic or bilinear; null: as the weights were trained with, else bicubic",
    )
    resize_mode: ResizeMode | None = Field(
        None,
        description="resizing in evaluation: shortest (shorter side, then center crop) or squash (both sides); null: as the weights were "
        "trained with, else shortest",
    )


class TextTowerConfig(Tower):
    """Base class of text towers, with the tokenizer.

    Attributes:
        openai_tokenizer: if `tokenizer` is null, OpenAI's tokenizer is used; False: the tower has its own.
        sigmoid: the published weights have the bias of the sigmoid loss.
        may_trim: a batch may be truncated to its longest text without a change of the features.
        open_clip_prefix: prefix of the parameter names in open_clip's files.
    """

    group: ClassVar[str] = "model/text"
    openai_tokenizer: ClassVar[bool] = True
    sigmoid: ClassVar[bool] = False
    may_trim: ClassVar[bool] = False
    open_clip_prefix: ClassVar[str] = "text."

    kind: str = Field(description="kind of text tower")
    context_length: Annotated[Size, Field(ge=3)] = Field(
        77,
        description="maximum number of tokens of a text, including start and end tokens; longer texts are truncated before the end token",
    )
    tokenizer: str | None = Field(
        None,
        description="tokenizer: a name on the Hugging Face hub, or a folder; null: that of the Hugging Face encoder, else OpenAI's",
    )
    cleaning: Cleaning = Field(
        Cleaning.whitespace,
        description="text normalization before tokenizer: whitespace, lower or canonicalize; OpenAI's tokenizer has its own",
    )
    strip_sep_token: bool = Field(
        False, description="replace the tokenizer's separator tokens by zeros, as CLIPA's weights expect"
    )

    unused: ClassVar[tuple[Unused, ...]] = (
        Unused(
            "cleaning strip_sep_token",
            lambda text: text.uses_openai_tokenizer,
            "with OpenAI's tokenizer",
            "leave it out, or set {at}tokenizer",
        ),
    )

    @property
    def uses_openai_tokenizer(self) -> bool:
        """True if the tokenizer is OpenAI's, which is part of the package."""
        return self.tokenizer is None and self.openai_tokenizer

    @property
    def tokenizer_source(self) -> str | None:
        """Folder of the tokenizer, or its name on the Hugging Face hub; None for OpenAI's, or if none is specified."""
        return self.tokenizer

    @property
    def trims(self) -> bool:
        """True if batches are truncated to their longest text, which does not change features; else they have the context length."""
        return self.may_trim

    def portable(self) -> Self:
        return self if self.uses_openai_tokenizer else self.model_copy(update={"tokenizer": HERE})

    def prefix_in_open_clip(self, model: "ModelConfig") -> str:
        """Return the prefix of the tower's parameter names in open_clip's files."""
        return self.open_clip_prefix

    def embedding_problems(self, where: str, tokenizer: Any, embedded: int) -> Iterator[str]:
        """Yield an error message if a tokenizer has ids without an embedding.

        Args:
            where: key and value that name the tokenizer, for the message.
            tokenizer: tokenizer of transformers.
            embedded: number of ids that the tower embeds.
        """
        if (highest := max(tokenizer.get_vocab().values())) >= embedded:
            yield f"{where} has ids up to {highest}, but the text tower embeds only {embedded} ids: use the tower's own tokenizer."

    def tokenizer_problems(self, where: str, tokenizer: Any) -> Iterator[str]:
        """Yield an error message for every reason why a tokenizer of transformers does not fit the tower.

        Args:
            where: key and value that name the tokenizer, for messages.
            tokenizer: tokenizer of transformers.
        """
        yield from ()

    def training_problems(self, model: "ModelConfig") -> Iterator[str]:
        """Yield an error message for every value that prevents training. Inference does not check these: published weights may have them."""
        yield from ()


class ModelConfig(Config):
    """Dual encoder: an image tower, a text tower, and their shared embedding space."""

    name: str = Field(description="name of the model, used in folder names and reports")
    embed_dim: Size = Field(description="dimension of the shared embedding space")
    image: ImageTowerConfig = Field(description="image tower and preprocessing of the images")
    text: TextTowerConfig = Field(description="text tower and its tokenizer")
    activation: Activation | None = Field(
        None,
        description="activation of the transformers' MLPs: gelu, quick_gelu or gelu_tanh; null: as the weights were trained with, else gelu",
    )
    dropout: Proportion = Field(
        0.0, description="dropout probability on the residual branches of transformers; ResNets have no dropout"
    )
    open_clip_name: str | None = Field(
        None,
        description="name of the same architecture in open_clip, whose tags of published weights pretrained accepts; null: none",
    )

    unused: ClassVar[tuple[Unused, ...]] = (
        Unused(
            "activation",
            lambda model: not model.uses_activation,
            "on towers of kind={c.image.kind} and kind={c.text.kind}, which define their own activation",
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
        """True if a tower uses `activation` in its MLPs and defines no other default."""
        return any(tower.takes_activation and not tower.own_activation for tower in self.towers)

    @property
    def uses_activation(self) -> bool:
        return any(tower.takes_activation for tower in self.towers)

    @property
    def own_towers(self) -> set[str]:
        """Names of the towers, `image` and `text`, that start from weights of their own library."""
        return {name for name, tower in zip(TOWERS, self.towers, strict=True) if tower.own_weights}

    def rules(self, at: str) -> Iterator[str]:
        yield from self.image.fits(self, at)
        yield from self.text.fits(self, at)


def folder_or_hub_name(name: str) -> str:
    """Return an argument for Hugging Face's `from_pretrained`: an existing folder, or a name on the hub, which has at most one slash.

    Raises:
        FileNotFoundError: the name can only be a folder, which does not exist.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return str(folder)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError("folder not found")
    return name
