"""What a model's configuration implies: why it cannot be built, and which towers start from their own library's weights."""

from collections.abc import Iterator
from typing import Any

from clip_exp.config.model_schema import ImageTower, ImageTowerConfig, ModelConfig, TextTower, TextTowerConfig
from clip_exp.open_clip_files import can_be_trimmed, open_clip_values

VOCABULARY = 49408  # of OpenAI's byte-pair encoding
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
# What may be set at all; the others of these fields are null.
IMAGE_SHAPE = ("patch_size", "stages", *TRANSFORMER, "name")
TEXT_SHAPE = (*TRANSFORMER, "name")


def check_model(model: ModelConfig) -> list[str]:
    """What makes a model impossible, a line each."""
    problems = [*_missing(model), *_not_positive(model)]
    if problems:
        return problems
    return [*_check_image(model.image), *_check_text(model.text), *_check_pair(model)]


def _missing(model: ModelConfig) -> Iterator[str]:
    towers: tuple[tuple[str, Any, tuple[str, ...]], ...] = (
        ("image", model.image, IMAGE_NEEDS[model.image.kind]),
        ("text", model.text, TEXT_NEEDS[model.text.kind]),
    )
    for tower, values, needed in towers:
        for name in needed:
            if getattr(values, name) is None:
                yield f"model.{tower}.{name} has no value, and {tower} towers of kind={values.kind} need it: set it."


def _not_positive(model: ModelConfig) -> Iterator[str]:
    names = ("image_size", "patch_size", "context_length", "vocab_size", "mlp_ratio", *TRANSFORMER)
    values = {
        f"model.{tower}.{name}": getattr(config, name, None)
        for tower, config in (("image", model.image), ("text", model.text))
        for name in names
    }
    for key, value in {"model.embed_dim": model.embed_dim, **values}.items():
        if value is not None and value <= 0:
            yield f"{key}={value} must be above 0."


def _check_image(image: ImageTowerConfig) -> Iterator[str]:
    if image.kind in (ImageTower.vit, ImageTower.siglip):
        yield from _check_heads("image", image.width, image.heads)
        if image.image_size % (image.patch_size or 1):
            yield f"model.image.image_size={image.image_size} must be a multiple of model.image.patch_size={image.patch_size}."
    if image.kind is ImageTower.resnet:
        if image.image_size % 32:
            yield f"model.image.image_size={image.image_size} must be a multiple of 32, which a resnet divides it by."
        if image.width and image.heads and 32 * image.width % image.heads:
            yield (
                f"model.image.heads={image.heads} must divide {32 * image.width}, the channels that a resnet of "
                f"model.image.width={image.width} pools."
            )
        if len(image.stages or ()) != 4 or min(image.stages or [0]) < 1:
            yield f"model.image.stages={image.stages} must be four numbers of blocks, each above 0."
    if not 0 <= image.patch_dropout < 1:
        yield f"model.image.patch_dropout={image.patch_dropout} must be at least 0 and below 1."
    if image.patch_dropout and image.kind is ImageTower.resnet:
        yield f"model.image.patch_dropout={image.patch_dropout}: a resnet has no patches to leave out. Set it to 0."
    if any(len(values) != 3 for values in (image.mean, image.std) if values is not None) or min(image.std or [1]) <= 0:
        yield f"model.image.mean={image.mean} and std={image.std} must be three numbers each, std above 0."


def _check_text(text: TextTowerConfig) -> Iterator[str]:
    if text.kind in (TextTower.clip, TextTower.siglip):
        yield from _check_heads("text", text.width, text.heads)
    if text.context_length < 3:
        yield f"model.text.context_length={text.context_length} must hold a start, a word and an end: at least 3."


def check_idle(model: ModelConfig) -> Iterator[str]:
    """What is set of a tower and would be ignored, because towers of its kind have no such thing."""
    optional = ("name",) if model.text.kind is TextTower.open_clip else ()
    towers: tuple[tuple[str, Any, tuple[str, ...], tuple[str, ...]], ...] = (
        ("image", model.image, IMAGE_SHAPE, IMAGE_NEEDS[model.image.kind]),
        ("text", model.text, TEXT_SHAPE, (*TEXT_NEEDS[model.text.kind], *optional)),
    )
    for tower, values, names, used in towers:
        for name in names:
            if name not in used and getattr(values, name) is not None:
                yield (
                    f"model.{tower}.{name}={getattr(values, name)} has no effect on {tower} towers of kind={values.kind}: "
                    "leave it out."
                )
    if model.text.kind is TextTower.open_clip:
        yield from _check_open_clip_text(model)
    if model.image.pretrained and "image" not in own_towers(model):
        yield (
            "model.image.pretrained=true is for backbones of timm (model/image=timm): weights of a whole model are pretrained=…"
        )


def own_towers(model: ModelConfig) -> set[str]:
    """Return which of the towers, `image` and `text`, the configuration starts from the weights of their own library."""
    image = model.image.pretrained and backbone_of(model) is not None
    text = model.text.pretrained and has_encoder(model)
    return {tower for tower, own in (("image", image), ("text", text)) if own}


def has_encoder(model: ModelConfig) -> bool:
    """Return whether the text tower is an encoder of Hugging Face's."""
    return model.text.kind in (TextTower.huggingface, TextTower.open_clip) and model.text.name is not None


def backbone_of(model: ModelConfig) -> str | None:
    """Return the name of the image tower's backbone in timm."""
    if model.image.kind is ImageTower.timm:
        return model.image.name
    if model.image.kind is ImageTower.open_clip:
        return open_clip_values(model.open_clip_name)["vision_cfg"].get("timm_model_name")
    return None


def _check_open_clip_text(model: ModelConfig) -> Iterator[str]:
    values = open_clip_values(model.open_clip_name)["text_cfg"]
    if model.text.name is not None and "hf_model_name" not in values:
        yield (
            f"model.text.name={model.text.name} has no effect: the text tower of model.name={model.open_clip_name} is "
            "open_clip's own. Leave it out."
        )
    if model.text.trim and not can_be_trimmed(values):
        yield (
            f"model.text.trim=true would change the features of model.name={model.open_clip_name}, whose texts need the whole "
            "context: leave it out."
        )


def check_vocabulary(text: TextTowerConfig) -> Iterator[str]:
    """Every id of OpenAI's tokenizer has an embedding."""
    if text.kind is TextTower.clip and text.tokenizer is None and text.vocab_size < VOCABULARY:
        yield f"model.text.vocab_size={text.vocab_size} must be at least {VOCABULARY}, the tokens there are."


def _check_pair(model: ModelConfig) -> Iterator[str]:
    if not 0 <= model.dropout < 1:
        yield f"model.dropout={model.dropout} must be at least 0 and below 1."
    if model.image.kind is ImageTower.siglip and model.image.width != model.embed_dim:
        yield (
            f"model.embed_dim={model.embed_dim} must be model.image.width={model.image.width}: a siglip image tower ends "
            "without a projection."
        )
    if (model.image.kind is ImageTower.open_clip) != (model.text.kind is TextTower.open_clip):
        yield "model.image.kind=open_clip and model.text.kind=open_clip go together: use model=open_clip model.name=…"


def _check_heads(tower: str, width: int | None, heads: int | None) -> Iterator[str]:
    if width and heads and width % heads:
        yield f"model.{tower}.width={width} must be a multiple of model.{tower}.heads={heads}."
