"""From a source to a model that is ready to encode."""

import logging

import torch

from clip_exp.errors import ConfigError
from clip_exp.loading.source import ModelSource
from clip_exp.loading.wise_ft import interpolate
from clip_exp.models.build import build_model
from clip_exp.models.clip import CLIP
from clip_exp.weights.files import read_weights
from clip_exp.weights.fit import fit_weights

log = logging.getLogger(__name__)
LOW_PRECISION = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def load_model(source: ModelSource, device: torch.device | str = "cpu") -> CLIP:
    """The model with its weights, in float32, in evaluation mode, without gradients.

    Raises:
        CheckpointError: the file cannot be read, or holds another model's weights.
    """
    state = read_weights(source.weights, source.model)
    model = build_model(source.model, init_logit_bias=0.0 if "logit_bias" in state else None)
    for note in fit_weights(model, state, str(source.weights)):
        log.warning(note)
    if source.mix is not None:
        tuned = {name: value.clone() for name, value in model.state_dict().items()}
        fit_weights(model, read_weights(source.mix.start, source.model), source.mix.start)
        model.load_state_dict(interpolate(model.state_dict(), tuned, source.mix.share))
    return model.to(device).eval().requires_grad_(False)


def choose_device(accelerator: str) -> torch.device:
    """`cpu`, `gpu`, or `auto`: a GPU where there is one.

    Raises:
        ConfigError: another name, or no GPU.
    """
    if accelerator not in ("auto", "cpu", "gpu", "cuda"):
        raise ConfigError(f"accelerator={accelerator} must be auto, cpu or gpu.")
    if accelerator == "cpu" or (accelerator == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(f"accelerator={accelerator}: torch finds no GPU here. Use accelerator=cpu.")
    return torch.device("cuda")


def choose_precision(precision: str, device: torch.device) -> str:
    """The precision that `auto` means on a device: bf16-mixed on GPUs that have it, else 32-true."""
    if precision != "auto":
        return precision
    return "bf16-mixed" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "32-true"


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The context in which a tower runs; disabled for 32-true, also inside another autocast."""
    return torch.autocast(device.type, LOW_PRECISION.get(precision), enabled=precision in LOW_PRECISION)
