"""From a source to a model that is ready to encode."""

import logging

import torch

from clip_exp.loading.source import ModelSource
from clip_exp.loading.wise_ft import interpolate
from clip_exp.models.build import build_model
from clip_exp.models.clip import CLIP
from clip_exp.weights.fit import fit_weights
from clip_exp.weights.read import read_weights

log = logging.getLogger(__name__)


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
