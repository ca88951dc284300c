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


def own_towers(model: ModelConfig) -> set[str]:
    """Return which of the towers, `image` and `text`, the configuration starts from the weights of their own library."""
    image = model.image.pretrained and backbone_of(model) is not None
    text = model.text.pretrained and has_encoder(model)
    return {tower for tower, own in (("image", image), ("text", text)) if own}


def has_encoder(model: ModelConfig) -> bool:
    """Return whether the text tower is an encoder of Hugging Face's."""
    if model.text.kind is TextTower.open_clip:
        return "hf_model_name" in open_clip_values(model.open_clip_name)["text_cfg"]
    return model.text.kind is TextTower.huggingface


def backbone_of(model: ModelConfig) -> str | None:
    """Return the name of the image tower's backbone in timm."""
    if model.image.kind is ImageTower.timm:
        return model.image.name
    if model.image.kind is ImageTower.open_clip:
        return open_clip_values(model.open_clip_name)["vision_cfg"].get("timm_model_name")
    return None


def has_own_mlp(model: ModelConfig) -> bool:
    """Return whether a tower is clip_exp's own, with `activation` in its MLPs; those of timm and Hugging Face have theirs."""
    return model.image.kind in (ImageTower.vit, ImageTower.siglip) or model.text.kind in (
        TextTower.clip,
        TextTower.siglip,
    )


def uses_activation(model: ModelConfig) -> bool:
    """Return whether `activation` changes the model: open_clip's architectures allow another in the place of their own."""
    return has_own_mlp(model) or model.image.kind is ImageTower.open_clip


def uses_openai(text: TextTowerConfig) -> bool:
    """Return whether captions are split by OpenAI's tokenizer, which the package carries."""
    return text.tokenizer is None and text.kind in (TextTower.clip, TextTower.open_clip)


def check_trim(model: ModelConfig) -> Iterator[str]:
    """Yield why texts may not be as short as a batch allows."""
    if model.text.kind is not TextTower.open_clip or not model.text.trim:
        return
    if not can_be_trimmed(open_clip_values(model.open_clip_name)["text_cfg"]):
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
