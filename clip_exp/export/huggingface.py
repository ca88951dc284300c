"""The folder that transformers' `CLIPModel` and `CLIPProcessor` load, or `SiglipModel` and `SiglipProcessor`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from clip_exp.config.model_schema import ImageTower, ModelConfig, TextTower
from clip_exp.export.preprocessor import write_preprocessor
from clip_exp.export.tokenizer_files import uses_openai, write_for_clip, write_own

if TYPE_CHECKING:
    from clip_exp.export.compare import Encoders
    from clip_exp.models.clip import CLIP

CONFIG, WEIGHTS = "config.json", "model.safetensors"
PAIRS = {(ImageTower.vit, TextTower.clip): "CLIP", (ImageTower.siglip, TextTower.siglip): "Siglip"}


def holds(config: ModelConfig) -> bool:
    """Whether transformers has a class for these two towers."""
    return (config.image.kind, config.text.kind) in PAIRS


def family_of(config: ModelConfig) -> str:
    """What the names of transformers' classes begin with."""
    return PAIRS[config.image.kind, config.text.kind]


def problems_of(config: ModelConfig) -> Iterator[str]:
    """What keeps a model of such towers from this format, a line each."""
    if family_of(config) == "CLIP" and not uses_openai(config.text):
        yield (
            f"format=huggingface: CLIPProcessor reads OpenAI's tokenizer, and this model has {config.text.tokenizer}. "
            "Use format=open_clip, safetensors or onnx."
        )


def write(folder: Path, model: "CLIP", config: ModelConfig) -> None:
    """Write `config.json`, `model.safetensors`, `preprocessor_config.json` and the tokenizer's files.

    CLIPModel has no bias of the logits: one that a sigmoid loss trained is left out, which moves no feature and no
    ranking.
    """
    from safetensors.torch import save_file

    from clip_exp.weights.huggingface import huggingface_config, to_huggingface

    family, state = family_of(config), to_huggingface(model.state_dict(), config)
    if family == "CLIP":
        state.pop("logit_bias", None)
        write_for_clip(folder, config.text)
    else:
        write_own(folder, config.text)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / WEIGHTS, {"format": "pt"})
    about = {**huggingface_config(config), "torch_dtype": "float32"}
    (folder / CONFIG).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    write_preprocessor(folder, config.image, family)


def read(folder: Path, config: ModelConfig) -> "Encoders":
    """The towers of what was written, built from its own `config.json`."""
    from clip_exp.api import load
    from clip_exp.export.compare import Encoders

    model = load(folder, accelerator="cpu").model
    return Encoders(model.encode_image, model.encode_text)
