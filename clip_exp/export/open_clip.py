"""Export for open_clip, which loads it as `local-dir:DIR`."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from clip_exp.config.model import Activation, ModelConfig
from clip_exp.data.images import preprocessing_of
from clip_exp.errors import ConfigError
from clip_exp.export.compare import Encoders
from clip_exp.export.tokenizer_files import write_custom
from clip_exp.models.clip import CLIP
from clip_exp.weights.names import to_open_clip

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"


def write(folder: Path, model: CLIP, config: ModelConfig) -> None:
    """Write `open_clip_config.json`, `open_clip_model.safetensors`, and the tokenizer's files unless it is OpenAI's."""
    state = to_open_clip(model.state_dict(), config)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / WEIGHTS, {"format": "pt"})
    bias = None if model.logit_bias is None else model.logit_bias.item()
    about = {"model_cfg": model_cfg(config, bias), "preprocess_cfg": preprocess_cfg(config)}
    (folder / CONFIG).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    if not config.text.uses_openai_tokenizer:
        write_custom(folder, config.text)


def read(folder: Path, config: ModelConfig) -> Encoders:
    """Load the exported towers with open_clip, strictly.

    Raises:
        ConfigError: open_clip cannot build the model.
    """
    # Imported here, since it takes seconds
    import open_clip

    try:
        theirs = open_clip.create_model(f"local-dir:{folder}").eval()
    except Exception as error:
        # timm and transformers, which build towers for open_clip, raise various exceptions.
        raise ConfigError(
            f"format=open_clip: open_clip cannot build this model ({' '.join(str(error).split())[:300]}). "
            "Use format=safetensors or onnx."
        ) from error
    return Encoders(theirs.encode_image, theirs.encode_text)


def model_cfg(config: ModelConfig, bias: float | None) -> dict[str, Any]:
    """Return open_clip's configuration of a model's architecture.

    Args:
        config: configuration of the model.
        bias: logit bias; None: the model has none.
    """
    values = {
        **config.image.open_clip_model(config),
        **config.text.open_clip_model(config),
        "embed_dim": config.embed_dim,
        "vision_cfg": config.image.open_clip_cfg(config),
        "text_cfg": config.text.open_clip_cfg(config),
    }
    if config.activation is not None or config.has_own_mlp:
        values["quick_gelu"] = config.activation is Activation.quick_gelu
    if bias is not None:
        values["init_logit_bias"] = bias
    return values


def preprocess_cfg(config: ModelConfig) -> dict[str, Any]:
    """Return open_clip's configuration of a model's preprocessing."""
    size, mean, std, interpolation, resize_mode = preprocessing_of(config.image)
    return {
        "size": [size, size],
        "mode": "RGB",
        "mean": mean,
        "std": std,
        "interpolation": interpolation.value,
        "resize_mode": resize_mode.value,
    }
