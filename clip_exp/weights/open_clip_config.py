"""From open_clip's description of an architecture to our model configurations, without torch.

FlagAI's `config.json` is written in the same words.
"""

from typing import Any

from clip_exp.config.model_schema import ImageTower, ImageTowerConfig, ModelConfig, TextTowerConfig
from clip_exp.config.models import known_models
from clip_exp.open_clip_files import configuration, configurations

# What a description leaves out. `image_size` and `patch_size` are those of open_clip's own code, not of a model.
VISION = {
    "image_size": 224,
    "layers": 12,
    "width": 768,
    "patch_size": 16,
    "head_width": 64,
    "mlp_ratio": 4.0,
    "patch_dropout": 0.0,
}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12, "mlp_ratio": 4.0}
TOKENIZER = ("hf_tokenizer_name", "tokenizer_kwargs", "timm_model_pretrained")  # change no tower's architecture


def is_open_clip_description(values: dict[str, Any]) -> bool:
    """Whether `values` describe an architecture in open_clip's words."""
    return (
        "embed_dim" in values
        and isinstance(values.get("vision_cfg"), dict)
        and isinstance(values.get("text_cfg"), dict)
    )


def model_of_description(values: dict[str, Any], name: str) -> ModelConfig | None:
    """The model that `values` describe; None where its towers are not ours.

    Args:
        values: `embed_dim`, `vision_cfg` and `text_cfg`. What they say about the activation is left to the caller.
        name: of the model.
    """
    vision, text = _told(values["vision_cfg"]), _told(values["text_cfg"])
    if vision.keys() <= VISION.keys() and text.keys() <= TEXT.keys():
        return _our_kind(name, values["embed_dim"], VISION | vision, TEXT | text)
    return _of_option(values)


def _told(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _our_kind(name: str, embed_dim: int, vision: dict[str, Any], text: dict[str, Any]) -> ModelConfig:
    stages = vision["layers"] if isinstance(vision["layers"], list) else None
    image = ImageTowerConfig(
        kind=ImageTower.resnet if stages else ImageTower.vit,
        image_size=vision["image_size"],
        width=vision["width"],
        heads=vision["width"] * (32 if stages else 1) // vision["head_width"],
        stages=stages,
        layers=None if stages else vision["layers"],
        patch_size=None if stages else vision["patch_size"],
        mlp_ratio=vision["mlp_ratio"],
    )
    return ModelConfig(name=name, embed_dim=embed_dim, image=image, text=TextTowerConfig(**text))


def _of_option(values: dict[str, Any]) -> ModelConfig | None:
    """The option of `conf/model/` whose architecture open_clip describes so."""
    for model in known_models():
        name = model.open_clip_name
        if name in configurations() and _architecture(configuration(name)) == _architecture(values):
            return model
    return None


def _architecture(values: dict[str, Any]) -> dict[str, Any]:
    towers = {tower: _told(values[tower]) for tower in ("vision_cfg", "text_cfg")}
    return {"embed_dim": values["embed_dim"]} | {
        tower: {key: value for key, value in told.items() if key not in TOKENIZER} for tower, told in towers.items()
    }
