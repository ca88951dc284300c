"""The folder that transformers' `CLIPModel` and `CLIPProcessor` load, or those of SigLIP or Chinese-CLIP."""

import json
from pathlib import Path

from safetensors.torch import save_file

from clip_exp.config.model import ModelConfig
from clip_exp.export.compare import Encoders
from clip_exp.export.preprocessor import write_preprocessor
from clip_exp.export.tokenizer_files import write_for_clip, write_own
from clip_exp.loading import load_model, source_of_file
from clip_exp.models.clip import CLIP
from clip_exp.models.families.published import huggingface_config, transformers_class
from clip_exp.weights.names import to_huggingface

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def write(folder: Path, model: CLIP, config: ModelConfig) -> None:
    """Write `config.json`, `model.safetensors`, `preprocessor_config.json` and the tokenizer's files.

    CLIPModel has no bias of the logits: one that a sigmoid loss trained is left out, which moves no feature and no
    ranking.
    """
    family, state = transformers_class(config), to_huggingface(model.state_dict(), config)
    assert family is not None  # `formats.holds`
    if not family.has_bias:
        state.pop("logit_bias", None)
    if family.needs_openai_tokenizer:
        write_for_clip(folder, config.text)
    else:
        write_own(folder, config.text)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / WEIGHTS, {"format": "pt"})
    about = {**huggingface_config(config), "torch_dtype": "float32"}
    (folder / CONFIG).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    write_preprocessor(folder, config.image, family.prefix)


def read(folder: Path, config: ModelConfig) -> Encoders:
    """Return the towers of what was written, built from its own `config.json`."""
    model = load_model(source_of_file(None, folder))
    return Encoders(model.encode_image, model.encode_text)
