"""Between our model configurations and those of other libraries, without torch.

open_clip describes an architecture by `embed_dim`, `vision_cfg` and `text_cfg`; FlagAI's `config.json` is written in the same words.
transformers has a `config.json` for CLIPModel and SiglipModel.
"""

import math
from pathlib import PurePath
from typing import Any

from clip_exp.config.model import (
    Activation,
    Cleaning,
    ImageTower,
    ImageTowerConfig,
    ModelConfig,
    ResizeMode,
    TextTower,
    TextTowerConfig,
)
from clip_exp.config.names import known_models
from clip_exp.errors import CheckpointError, ConfigError
from clip_exp.open_clip_files import configuration, configurations

# What a description of open_clip leaves out. `image_size` and `patch_size` are those of open_clip's own code, not of a model.
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


# The `config.json` of transformers' CLIPModel and SiglipModel.

# The first name of an activation is the one that is written.
ACTIVATIONS = {
    "quick_gelu": Activation.quick_gelu,
    "gelu": Activation.gelu,
    "gelu_pytorch_tanh": Activation.gelu_tanh,
    "gelu_new": Activation.gelu_tanh,
}
# A config.json may leave out what equals the classes' defaults. CLIP's and SigLIP's norms differ in their epsilon.
TEXT_DEFAULTS: dict[str, dict[str, Any]] = {
    "clip": {
        "vocab_size": 49408, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12,
        "num_attention_heads": 8, "max_position_embeddings": 77, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
    },
    "siglip": {
        "vocab_size": 32000, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
        "num_attention_heads": 12, "max_position_embeddings": 64, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6,
    },
}  # fmt: skip
VISION_DEFAULTS: dict[str, dict[str, Any]] = {
    "clip": {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
    },
    "siglip": {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "image_size": 224, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6,
    },
}  # fmt: skip
KINDS = {"clip": (ImageTower.vit, TextTower.clip), "siglip": (ImageTower.siglip, TextTower.siglip)}
ARGMAX_POOLING = 2  # the end token's id in CLIP configurations before transformers 4.31: "the highest id of the text"


def is_huggingface_config(config: dict[str, Any]) -> bool:
    """Whether a `config.json` is one of transformers' CLIPModel or SiglipModel."""
    return config.get("model_type") in KINDS


def model_config_of(config: dict[str, Any]) -> ModelConfig:
    """The model that a `config.json` of CLIPModel or SiglipModel describes.

    Raises:
        CheckpointError: another class, or numbers that our towers do not have.
    """
    family = config.get("model_type")
    if family not in KINDS:
        raise CheckpointError(
            f"config.json: model_type={family} is none of {', '.join(KINDS)}, the ones that are read."
        )
    text = TEXT_DEFAULTS[family] | (config.get("text_config_dict") or config.get("text_config") or {})
    vision = VISION_DEFAULTS[family] | (config.get("vision_config_dict") or config.get("vision_config") or {})
    embed_dim = config.get("projection_dim", 512) if family == "clip" else vision["hidden_size"]
    if problems := _problems(family, text, vision, embed_dim):
        raise CheckpointError("\n".join(f"config.json: {problem}" for problem in problems))
    return ModelConfig(
        name=PurePath(config.get("_name_or_path") or family).name,
        embed_dim=embed_dim,
        image=_image_tower(family, vision),
        text=_text_tower(family, text),
        activation=ACTIVATIONS[vision["hidden_act"]],
    )


def _image_tower(family: str, vision: dict[str, Any]) -> ImageTowerConfig:
    siglip = family == "siglip"  # whose publishers treated pictures in their own way
    return ImageTowerConfig(
        kind=KINDS[family][0],
        image_size=vision["image_size"],
        patch_size=vision["patch_size"],
        width=vision["hidden_size"],
        layers=vision["num_hidden_layers"],
        heads=vision["num_attention_heads"],
        mlp_ratio=mlp_ratio(vision["intermediate_size"], vision["hidden_size"]),
        mean=[0.5] * 3 if siglip else None,
        std=[0.5] * 3 if siglip else None,
        resize_mode=ResizeMode.squash if siglip else None,
    )


def _text_tower(family: str, text: dict[str, Any]) -> TextTowerConfig:
    return TextTowerConfig(
        kind=KINDS[family][1],
        context_length=text["max_position_embeddings"],
        vocab_size=text["vocab_size"],
        width=text["hidden_size"],
        layers=text["num_hidden_layers"],
        heads=text["num_attention_heads"],
        mlp_ratio=mlp_ratio(text["intermediate_size"], text["hidden_size"]),
        cleaning=Cleaning.canonicalize if family == "siglip" else Cleaning.whitespace,
    )


def _problems(family: str, text: dict[str, Any], vision: dict[str, Any], embed_dim: int) -> list[str]:
    """Why our towers would not compute what these configurations describe."""
    problems = []
    eps = VISION_DEFAULTS[family]["layer_norm_eps"]
    if text["hidden_act"] != vision["hidden_act"] or vision["hidden_act"] not in ACTIVATIONS:
        problems.append(
            f"hidden_act={vision['hidden_act']} of pictures and {text['hidden_act']} of texts must be the same and one of "
            f"{', '.join(ACTIVATIONS)}."
        )
    if text["layer_norm_eps"] != eps or vision["layer_norm_eps"] != eps:
        problems.append(f"layer_norm_eps={vision['layer_norm_eps']} and {text['layer_norm_eps']} must be {eps}.")
    if family == "clip" and text.get("eos_token_id") not in (None, ARGMAX_POOLING, text["vocab_size"] - 1):
        problems.append(
            f"eos_token_id={text['eos_token_id']} must be the highest of {text['vocab_size']} ids, which the text tower pools at."
        )
    if family == "siglip" and (text.get("projection_size") or text["hidden_size"]) != embed_dim:
        problems.append(f"text features of {text.get('projection_size')} channels beside {embed_dim} of pictures.")
    if family == "siglip" and not vision.get("vision_use_head", True):
        problems.append("vision_use_head=false: a tower without its pooling head.")
    if vision.get("num_channels", 3) != 3 or not isinstance(vision["image_size"], int):
        problems.append("pictures must be square and have three channels.")
    return problems


def mlp_ratio(hidden: int, width: int) -> float:
    """A ratio of at most four decimals, if there is one, that gives `hidden` channels as `int(width * ratio)`."""
    rounded_up = math.ceil(hidden / width * 10_000) / 10_000
    return rounded_up if int(width * rounded_up) == hidden else math.nextafter(hidden / width, math.inf)


def huggingface_config(model: ModelConfig) -> dict[str, Any]:
    """The `config.json` with which transformers' `from_pretrained` builds the same model: CLIPModel or SiglipModel.

    Raises:
        ConfigError: transformers has no class for these towers.
    """
    family = next((name for name, kinds in KINDS.items() if kinds == (model.image.kind, model.text.kind)), None)
    if family is None:
        raise ConfigError(
            f"model={model.name}: transformers has no model of a {model.image.kind} and a {model.text.kind} tower, only of vit "
            "and clip (CLIPModel) and of siglip and siglip (SiglipModel). Use format=open_clip or format=safetensors."
        )
    vision_config, text_config = _vision_config(model, family), _text_config(model, family)
    config: dict[str, Any] = {"model_type": family, "vision_config": vision_config, "text_config": text_config}
    if family == "siglip":
        text_config["projection_size"] = model.embed_dim
        return {"architectures": ["SiglipModel"], **config}
    for values in (config, vision_config, text_config):
        values["projection_dim"] = model.embed_dim
    text_config |= {"bos_token_id": model.text.vocab_size - 2, "eos_token_id": model.text.vocab_size - 1}
    return {"architectures": ["CLIPModel"], **config}


def _vision_config(model: ModelConfig, family: str) -> dict[str, Any]:
    image, eps = model.image, VISION_DEFAULTS[family]["layer_norm_eps"]
    return {
        **_transformer(model, image.width or 0, image.layers, image.heads, image.mlp_ratio, eps),
        "image_size": image.image_size,
        "patch_size": image.patch_size,
        "num_channels": 3,
    }


def _text_config(model: ModelConfig, family: str) -> dict[str, Any]:
    text, eps = model.text, TEXT_DEFAULTS[family]["layer_norm_eps"]
    return {
        **_transformer(model, text.width or 0, text.layers, text.heads, text.mlp_ratio, eps),
        "max_position_embeddings": text.context_length,
        "vocab_size": text.vocab_size,
    }


def _transformer(
    model: ModelConfig, width: int, layers: int | None, heads: int | None, ratio: float, eps: float
) -> dict[str, Any]:
    activation = model.activation or Activation.gelu
    return {
        "hidden_size": width,
        "intermediate_size": int(width * ratio),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "hidden_act": next(name for name, value in ACTIVATIONS.items() if value is activation),
        "layer_norm_eps": eps,
    }
