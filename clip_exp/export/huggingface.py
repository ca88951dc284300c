"""Export for transformers' `CLIPModel` and `CLIPProcessor`, or those of SigLIP or Chinese-CLIP."""

import json
from pathlib import Path

from safetensors.torch import save_file

from clip_exp.config.model import ModelConfig
from clip_exp.export.compare import Encoders
from clip_exp.export.preprocessor import write_preprocessor
from clip_exp.export.tokenizer_files import write_custom, write_for_clip
from clip_exp.loading import load_model, source_of_file
from clip_exp.models.clip import CLIP
from clip_exp.models.families.published import huggingface_config, transformers_class
from clip_exp.weights.names import to_huggingface

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def write(folder: Path, model: CLIP, config: ModelConfig) -> None:
    """Write `config.json`, `model.safetensors`, `preprocessor_config.json` and the tokenizer's files.

    CLIPModel has no logit bias, so that of a model trained with the sigmoid loss is left out. Features and rankings do
    not depend on it.
    """
    family, state = transformers_class(config), to_huggingface(model.state_dict(), config)
    # Checked by `formats.holds`
    assert family is not None
    if not family.has_bias:
        state.pop("logit_bias", None)
    if family.needs_openai_tokenizer:
        write_for_clip(folder, config.text)
    else:
        write_custom(folder, config.text)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / WEIGHTS, {"format": "pt"})
    about = {**huggingface_config(config), "torch_dtype": "float32"}
    (folder / CONFIG).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    write_preprocessor(folder, config.image, family.prefix)


def read(folder: Path, config: ModelConfig) -> Encoders:
    """Load the exported towers, built from the exported `config.json`."""
    model = load_model(source_of_file(None, folder))
    return Encoders(model.encode_image, model.encode_text)
