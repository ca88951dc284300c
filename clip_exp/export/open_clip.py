"""The folder that open_clip loads as `local-dir:DIR`; its weights fit a model of the same architecture there."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from clip_exp.config.model import Activation, Cleaning, ImageTower, ModelConfig, TextTower
from clip_exp.data.images import preprocessing_of
from clip_exp.errors import ConfigError
from clip_exp.export.compare import Encoders
from clip_exp.export.formats import published
from clip_exp.export.tokenizer_files import write_own
from clip_exp.models.clip import CLIP
from clip_exp.weights.names import to_open_clip

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
HEAD_WIDTH, MLP_RATIO = 64, 4.0  # open_clip's, where its configuration says nothing


def write(folder: Path, model: CLIP, config: ModelConfig) -> None:
    """Write `open_clip_config.json`, `open_clip_model.safetensors`, and the tokenizer's files unless it is OpenAI's."""
    state = to_open_clip(model.state_dict(), config)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / WEIGHTS, {"format": "pt"})
    bias = None if model.logit_bias is None else model.logit_bias.item()
    about = {"model_cfg": model_cfg(config, bias), "preprocess_cfg": preprocess_cfg(config)}
    (folder / CONFIG).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    if not config.text.uses_openai_tokenizer:
        write_own(folder, config.text)


def read(folder: Path, config: ModelConfig) -> Encoders:
    """The towers as open_clip itself loads them, strictly.

    Raises:
        ConfigError: open_clip has no such model.
    """
    import open_clip  # takes seconds

    try:
        theirs = open_clip.create_model(f"local-dir:{folder}").eval()
    except Exception as error:  # timm and transformers, which open_clip asks for towers, fail in ways of their own
        raise ConfigError(
            f"format=open_clip: open_clip cannot build this model ({' '.join(str(error).split())[:300]}). "
            "Use format=safetensors or onnx."
        ) from error
    return Encoders(theirs.encode_image, theirs.encode_text)


def model_cfg(config: ModelConfig, bias: float | None) -> dict[str, Any]:
    """The architecture, as open_clip's configurations have it.

    Args:
        bias: of the logits; None: the model has none.
    """
    if config.image.kind is ImageTower.open_clip:
        # Of CoCa there is no decoder, for which alone its towers return their tokens too.
        values = {key: value for key, value in published(config).items() if key != "multimodal_cfg"}
        common = {"output_tokens": False, **_act(config)}
        values["vision_cfg"] |= {"image_size": config.image.image_size, **common}
        values["text_cfg"] |= {"context_length": config.text.context_length, **common}
    else:
        values = {"embed_dim": config.embed_dim, "vision_cfg": _vision_cfg(config), "text_cfg": _text_cfg(config)}
    if config.text.kind is TextTower.siglip:
        values["custom_text"] = True  # the text tower's weights below `text.`
    if config.activation is not None or config.image.kind is not ImageTower.open_clip:
        values["quick_gelu"] = config.activation is Activation.quick_gelu
    if bias is not None:
        values["init_logit_bias"] = bias
    return values


def preprocess_cfg(config: ModelConfig) -> dict[str, Any]:
    """What happens to a picture before the image tower."""
    size, mean, std, interpolation, resize_mode = preprocessing_of(config.image)
    return {
        "size": [size, size],
        "mode": "RGB",
        "mean": mean,
        "std": std,
        "interpolation": interpolation.value,
        "resize_mode": resize_mode.value,
    }


def _vision_cfg(config: ModelConfig) -> dict[str, Any]:
    image = config.image
    match image.kind:
        case ImageTower.timm:
            return {
                "image_size": image.image_size,
                "timm_model_name": image.name,
                "timm_model_pretrained": False,
                "timm_pool": "",  # the backbone's own
                "timm_proj": image.projection.value,
            }
        case ImageTower.siglip:
            return {**published(config)["vision_cfg"], "image_size": image.image_size}
        case ImageTower.resnet:
            assert image.width is not None
            assert image.heads is not None
            numbers: dict[str, Any] = {"layers": image.stages, "patch_size": None}
            head_width = 32 * image.width // image.heads
        case _:
            assert image.width is not None
            assert image.heads is not None
            numbers = {"layers": image.layers, "patch_size": image.patch_size, **_mlp(image.mlp_ratio), **_act(config)}
            head_width = image.width // image.heads
    heads = {} if head_width == HEAD_WIDTH else {"head_width": head_width}
    return {"image_size": image.image_size, "width": image.width, **numbers, **heads}


def _text_cfg(config: ModelConfig) -> dict[str, Any]:
    text = config.text
    values = {name: getattr(text, name) for name in ("context_length", "vocab_size", "width", "heads", "layers")}
    values |= {**_mlp(text.mlp_ratio), **_act(config)}
    if text.kind is TextTower.siglip:
        values |= {"no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}}
    if text.tokenizer is not None:
        # The name alone: open_clip takes the tokenizer from the folder itself.
        values["hf_tokenizer_name"] = Path(text.tokenizer).name if Path(text.tokenizer).is_dir() else text.tokenizer
        cleaned = {} if text.cleaning is Cleaning.whitespace else {"clean": text.cleaning.value}
        stripped = {"strip_sep_token": True} if text.strip_sep_token else {}
        values["tokenizer_kwargs"] = {**cleaned, **stripped}
    return values


def _mlp(ratio: float) -> dict[str, Any]:
    return {} if ratio == MLP_RATIO else {"mlp_ratio": ratio}


def _act(config: ModelConfig) -> dict[str, Any]:
    return {"act_kwargs": {"approximate": "tanh"}} if config.activation is Activation.gelu_tanh else {}
