"""Conversion between configurations of clip_exp and those of other libraries: open_clip, and the `config.json` of transformers.

open_clip describes an architecture by `embed_dim`, `vision_cfg` and `text_cfg`; FlagAI's `config.json` has the same keys. Of transformers,
CLIPModel, SiglipModel and ChineseCLIPModel are supported. This module converts whole models; what concerns a single tower is in its
family. No torch.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from clip_exp.config.model import (
    Activation,
    Cleaning,
    ImageTowerConfig,
    ModelConfig,
    Pooler,
    Projection,
    ResizeMode,
    TextTowerConfig,
)
from clip_exp.errors import CheckpointError, ConfigError
from clip_exp.models.families.clip import CLIPTextConfig, ResNetConfig, ViTConfig
from clip_exp.models.families.huggingface import HuggingFaceTextConfig
from clip_exp.models.families.siglip import SigLIPImageConfig, SigLIPTextConfig
from clip_exp.open_clip_files import configuration, configurations

Values = dict[str, Any]

# ------------------------------------------------------------------------------------------------------ open_clip

# Default values of open_clip's configurations. `image_size` and `patch_size` are the defaults in open_clip's code.
VISION = {
    "image_size": 224, "layers": 12, "width": 768, "patch_size": 16, "head_width": 64, "mlp_ratio": 4.0, "patch_dropout": 0.0,
}  # fmt: skip
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12, "mlp_ratio": 4.0}
TOKENIZER = ("hf_tokenizer_name", "tokenizer_kwargs", "timm_model_pretrained")  # do not change the architecture


def is_open_clip_description(values: Values) -> bool:
    """Return True if values are an architecture in open_clip's format."""
    return "embed_dim" in values and all(isinstance(values.get(cfg), dict) for cfg in ("vision_cfg", "text_cfg"))


def model_of_description(values: Values, name: str) -> ModelConfig | None:
    """Return the configuration of the model that values describe; None if its towers are not implemented in clip_exp.

    Args:
        values: `embed_dim`, `vision_cfg` and `text_cfg`. The activation is left to the caller.
        name: name of the model.
    """
    vision, text = _without_null(values["vision_cfg"]), _without_null(values["text_cfg"])
    if not (vision.keys() <= VISION.keys() and text.keys() <= TEXT.keys()):
        return None
    vision, text = VISION | vision, TEXT | text
    size, width, head_width = vision["image_size"], vision["width"], vision["head_width"]
    image: ImageTowerConfig
    if isinstance(vision["layers"], list):
        image = ResNetConfig(image_size=size, width=width, heads=32 * width // head_width, stages=vision["layers"])
    else:
        numbers = {key: vision[key] for key in ("layers", "patch_size", "mlp_ratio")}
        image = ViTConfig(image_size=size, width=width, heads=width // head_width, **numbers)
    return ModelConfig(name=name, embed_dim=values["embed_dim"], image=image, text=CLIPTextConfig(**text))


def describes(values: Values, open_clip_name: str | None) -> bool:
    """Return True if values describe the architecture that open_clip has under a name."""
    return open_clip_name in configurations() and _architecture(configuration(open_clip_name)) == _architecture(values)


def has_activation_of_description(model: ModelConfig) -> bool:
    """Return True if open_clip's configuration determines the activation of a model: quick_gelu if it is set, gelu otherwise."""
    return isinstance(model.image, ViTConfig | ResNetConfig)


def _without_null(values: Values) -> Values:
    return {key: value for key, value in values.items() if value is not None}


def _architecture(values: Values) -> Values:
    towers = {cfg: _without_null(values[cfg]) for cfg in ("vision_cfg", "text_cfg")}
    return {"embed_dim": values["embed_dim"]} | {
        cfg: {key: value for key, value in tower.items() if key not in TOKENIZER} for cfg, tower in towers.items()
    }


# --------------------------------------------------------------------------------------------------- transformers

ACTIVATIONS = {  # if an activation has several names, the first is written
    "quick_gelu": Activation.quick_gelu,
    "gelu": Activation.gelu,
    "gelu_pytorch_tanh": Activation.gelu_tanh,
    "gelu_new": Activation.gelu_tanh,
}
# Defaults of the classes, which a config.json may leave out. CLIP and SigLIP have a different epsilon in their norms.
TEXT_DEFAULTS: dict[str, Values] = {
    "clip": {
        "vocab_size": 49408, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12,
        "num_attention_heads": 8, "max_position_embeddings": 77, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
    },
    "siglip": {
        "vocab_size": 32000, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
        "num_attention_heads": 12, "max_position_embeddings": 64, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6,
    },
    # BERT: the keys of transformers' ChineseCLIPTextConfig that affect its computation, which BertConfig has too.
    "chinese_clip": {
        "vocab_size": 30522, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "max_position_embeddings": 512, "hidden_act": "gelu", "layer_norm_eps": 1e-12, "type_vocab_size": 2, "pad_token_id": 0,
    },
}  # fmt: skip
VISION_DEFAULTS: dict[str, Values] = {
    "clip": {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
    },
    "siglip": {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "image_size": 224, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6,
    },
}  # fmt: skip
VISION_DEFAULTS["chinese_clip"] = VISION_DEFAULTS["clip"]
# Id of the end token in CLIP configurations before transformers 4.31, which means the highest id of the text.
ARGMAX_POOLING = 2
BERT_POSITIONS = 512
CHINESE_CLIP_CONTEXT = 52  # context length with which Chinese-CLIP was trained (Yang et al. 2022)


class TransformersClass(NamedTuple):
    """Model class of transformers with both towers."""

    model_type: str  # its `model_type` in config.json
    prefix: str  # prefix of its class names: CLIP for CLIPModel and CLIPProcessor
    image: type[ImageTowerConfig]
    text: type[TextTowerConfig]
    needs_openai_tokenizer: bool
    read_text: Callable[[Values, Path], TextTowerConfig]
    write_text: Callable[[ModelConfig, Values], Values]
    scalar_logits: bool  # whether logit_scale has shape [] instead of [1]
    has_bias: bool
    fits: Callable[[Any], bool] = lambda text: True


CLASSES: list[TransformersClass] = []


def transformers_class(model: ModelConfig) -> TransformersClass | None:
    """Return the class of transformers for a model's towers; None if there is none."""
    for each in CLASSES:
        if isinstance(model.image, each.image) and isinstance(model.text, each.text) and each.fits(model.text):
            return each
    return None


def is_huggingface_config(config: Values) -> bool:
    """Return True if a `config.json` belongs to a supported class of transformers."""
    return config.get("model_type") in {c.model_type for c in CLASSES}


def model_config_of(config: Values, folder: Path = Path()) -> ModelConfig:
    """Return the configuration of the model that a `config.json` of transformers describes.

    Args:
        config: contents of the file.
        folder: folder of the file, which also contains the tokenizer unless that is OpenAI's.

    Raises:
        CheckpointError: the class is not supported, or has values that clip_exp's towers do not support.
    """
    family = next((c for c in CLASSES if c.model_type == config.get("model_type")), None)
    if family is None:
        known = ", ".join(c.model_type for c in CLASSES)
        raise CheckpointError(
            f"config.json: model_type={config.get('model_type')} is not supported. Supported: {known}."
        )
    name = family.model_type
    text = TEXT_DEFAULTS[name] | (config.get("text_config_dict") or config.get("text_config") or {})
    vision = VISION_DEFAULTS[name] | (config.get("vision_config_dict") or config.get("vision_config") or {})
    embed_dim = vision["hidden_size"] if name == "siglip" else config.get("projection_dim", 512)
    if problems := _problems(name, text, vision, embed_dim):
        raise CheckpointError("\n".join(f"config.json: {problem}" for problem in problems))
    # SigLIP and Chinese-CLIP resize images without keeping the aspect ratio, and SigLIP has its own mean and standard deviation.
    half, squash = [0.5] * 3 if name == "siglip" else None, None if name == "clip" else ResizeMode.squash
    image = family.image(
        image_size=vision["image_size"],
        mean=half,
        std=half,
        resize_mode=squash,
        patch_size=vision["patch_size"],
        **_from_transformer(vision),
    )  # type: ignore[call-arg]
    return ModelConfig(
        name=PurePath(config.get("_name_or_path") or name).name,
        embed_dim=embed_dim,
        image=image,
        text=family.read_text(text, folder),
        activation=ACTIVATIONS[vision["hidden_act"]],
    )


def huggingface_config(model: ModelConfig) -> Values:
    """Return the `config.json` from which transformers' `from_pretrained` builds the same model.

    Raises:
        ConfigError: transformers has no class for these towers.
    """
    family = transformers_class(model)
    if family is None:
        pairs = ", ".join(f"{_kind(c.image)} and {_kind(c.text)} ({c.prefix}Model)" for c in CLASSES)
        raise ConfigError(
            f"model={model.name}: transformers has no model with a {model.image.kind} and a {model.text.kind} tower, only with {pairs}. "
            "Use format=open_clip or format=safetensors."
        )
    eps = VISION_DEFAULTS[family.model_type]["layer_norm_eps"]
    vision: Values = {
        **_to_transformer(model, model.image, eps),
        "image_size": model.image.image_size,
        "patch_size": model.image.patch_size,  # type: ignore[attr-defined]
        "num_channels": 3,
    }
    config: Values = {"architectures": [f"{family.prefix}Model"], "model_type": family.model_type}
    text = family.write_text(model, TEXT_DEFAULTS[family.model_type])
    if family.model_type != "siglip":
        config["projection_dim"] = vision["projection_dim"] = model.embed_dim
    return {**config, "vision_config": vision, "text_config": text}


def _kind(tower: Any) -> str:
    return tower.model_fields["kind"].default


def mlp_ratio(hidden: int, width: int) -> float:
    """Return a ratio for which `int(width * ratio)` is `hidden`, with at most four decimals if possible."""
    rounded_up = math.ceil(hidden / width * 10_000) / 10_000
    return rounded_up if int(width * rounded_up) == hidden else math.nextafter(hidden / width, math.inf)


def _from_transformer(values: Values) -> Values:
    return {
        "width": values["hidden_size"],
        "layers": values["num_hidden_layers"],
        "heads": values["num_attention_heads"],
        "mlp_ratio": mlp_ratio(values["intermediate_size"], values["hidden_size"]),
    }


def _to_transformer(model: ModelConfig, tower: Any, eps: float) -> Values:
    activation = model.activation or Activation.gelu
    return {
        "hidden_size": tower.width,
        "intermediate_size": int(tower.width * tower.mlp_ratio),
        "num_hidden_layers": tower.layers,
        "num_attention_heads": tower.heads,
        "hidden_act": next(name for name, value in ACTIVATIONS.items() if value is activation),
        "layer_norm_eps": eps,
    }


def _problems(family: str, text: Values, vision: Values, embed_dim: int) -> list[str]:
    """Return the problems of configurations that clip_exp's towers cannot reproduce."""
    problems = []
    eps = VISION_DEFAULTS[family]["layer_norm_eps"]
    if vision["hidden_act"] not in ACTIVATIONS or (
        family != "chinese_clip" and text["hidden_act"] != vision["hidden_act"]
    ):
        problems.append(
            f"hidden_act={vision['hidden_act']} of the image tower and {text['hidden_act']} of the text tower must be equal, and one of "
            f"{', '.join(ACTIVATIONS)}."
        )
    if vision["layer_norm_eps"] != eps or (family != "chinese_clip" and text["layer_norm_eps"] != eps):
        problems.append(f"layer_norm_eps={vision['layer_norm_eps']} and {text['layer_norm_eps']} must be {eps}.")
    if family == "clip" and text.get("eos_token_id") not in (None, ARGMAX_POOLING, text["vocab_size"] - 1):
        problems.append(
            f"eos_token_id={text['eos_token_id']} must be the highest of {text['vocab_size']} ids, at which the text tower pools."
        )
    if family == "siglip" and (text.get("projection_size") or text["hidden_size"]) != embed_dim:
        problems.append(
            f"projection_size={text.get('projection_size')} of the text tower must be {embed_dim}, the width of image features."
        )
    if family == "siglip" and not vision.get("vision_use_head", True):
        problems.append("vision_use_head=false is not supported: the image tower needs its pooling head.")
    if family == "chinese_clip" and text.get("position_embedding_type", "absolute") != "absolute":
        problems.append(
            f"position_embedding_type={text['position_embedding_type']} of the text tower must be absolute."
        )
    if vision.get("num_channels", 3) != 3 or not isinstance(vision["image_size"], int):
        problems.append("images must be square and have three channels.")
    return problems


def _read_clip_text(text: Values, folder: Path) -> TextTowerConfig:
    sizes = {"context_length": text["max_position_embeddings"], "vocab_size": text["vocab_size"]}
    return CLIPTextConfig(**sizes, **_from_transformer(text))


def _read_siglip_text(text: Values, folder: Path) -> TextTowerConfig:
    sizes = {"context_length": text["max_position_embeddings"], "vocab_size": text["vocab_size"]}
    return SigLIPTextConfig(**sizes, **_from_transformer(text), tokenizer=str(folder), cleaning=Cleaning.canonicalize)


def _read_bert(text: Values, folder: Path) -> TextTowerConfig:
    """Return the text tower of Chinese-CLIP: BERT with its first token, projected."""
    architecture = {key: text[key] for key in TEXT_DEFAULTS["chinese_clip"]} | {"model_type": "bert"}
    return HuggingFaceTextConfig(
        name=str(folder),
        pretrained=False,
        architecture=architecture,
        context_length=min(_written_length(folder) or CHINESE_CLIP_CONTEXT, text["max_position_embeddings"]),
        pooler=Pooler.cls,
        projection=Projection.linear,
        tokenizer=str(folder),
    )


def _written_length(folder: Path) -> int | None:
    """Return the context length that an export has written to the tokenizer's configuration; None if it is BERT's 512 or missing."""
    try:
        length = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("model_max_length")
    except (OSError, ValueError, AttributeError):
        return None
    return length if isinstance(length, int) and 3 <= length < BERT_POSITIONS else None


def _is_bert(text: HuggingFaceTextConfig) -> bool:
    # Without a recorded architecture it may be BERT; whether it is, is known when the configuration is written.
    encoder = text.architecture.get("model_type", "bert")
    return encoder == "bert" and text.pooler is Pooler.cls and text.projection is Projection.linear


def _write_own_text(model: ModelConfig, defaults: Values) -> Values:
    """Return the text configuration of a transformer of clip_exp."""
    text: Any = model.text
    values = {
        **_to_transformer(model, text, defaults["layer_norm_eps"]),
        "max_position_embeddings": text.context_length,
        "vocab_size": text.vocab_size,
    }
    if isinstance(text, SigLIPTextConfig):
        return {**values, "projection_size": model.embed_dim}
    ends = {"bos_token_id": text.vocab_size - 2, "eos_token_id": text.vocab_size - 1}
    return {**values, "projection_dim": model.embed_dim, **ends}


def _write_bert(model: ModelConfig, defaults: Values) -> Values:
    """Return the text configuration of an encoder, from the architecture recorded by its run."""
    assert isinstance(model.text, HuggingFaceTextConfig)
    return defaults | {key: value for key, value in model.text.architecture.items() if key != "model_type"}


CLASSES += [
    TransformersClass("clip", "CLIP", ViTConfig, CLIPTextConfig, True, _read_clip_text, _write_own_text, True, False),
    TransformersClass(
        "siglip", "Siglip", SigLIPImageConfig, SigLIPTextConfig, False, _read_siglip_text, _write_own_text, False, True
    ),
    TransformersClass(
        "chinese_clip",
        "ChineseCLIP",
        ViTConfig,
        HuggingFaceTextConfig,
        False,
        _read_bert,
        _write_bert,
        True,
        False,
        _is_bert,
    ),
]
