"""Export in clip_exp's own format: a safetensors file with the configuration of the model in its metadata."""

import json
from pathlib import Path

from safetensors.torch import save_file

from clip_exp.checkpoints.folders import WEIGHTS
from clip_exp.config.base import plain
from clip_exp.config.model import Activation, ModelConfig
from clip_exp.export.compare import Encoders
from clip_exp.export.tokenizer_files import write_custom
from clip_exp.loading import load_model, source_of_file
from clip_exp.models.clip import CLIP
from clip_exp.weights.inspect import OUR_METADATA


def write(folder: Path, model: CLIP, config: ModelConfig) -> None:
    """Write `model.safetensors`, and the tokenizer's files unless it is OpenAI's."""
    if not config.text.uses_openai_tokenizer:
        write_custom(folder, config.text)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / WEIGHTS, {"format": "pt", OUR_METADATA: json.dumps(plain(portable(config)))})


def read(folder: Path, config: ModelConfig) -> Encoders:
    """Load the exported towers, as `clip_exp.load` does."""
    model = load_model(source_of_file(None, folder / WEIGHTS))
    return Encoders(model.encode_image, model.encode_text)


def portable(config: ModelConfig) -> ModelConfig:
    """Return a complete configuration without paths of this machine."""
    activation = config.activation or (Activation.gelu if config.has_own_mlp else None)
    towers = {"image": config.image.portable(), "text": config.text.portable()}
    return config.model_copy(update={**towers, "activation": activation})
