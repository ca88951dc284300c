"""From a source to a model that is ready to encode."""

import logging

import torch
from torch import nn

from clip_exp.loading.source import ModelSource
from clip_exp.loading.wise_ft import interpolate
from clip_exp.models.clip import CLIP, build_model
from clip_exp.weights.fit import fit_weights, load_weights
from clip_exp.weights.read import BIAS, find_model_weights

log = logging.getLogger(__name__)


def load_model(source: ModelSource, device: torch.device | str = "cpu") -> CLIP:
    """The model with its weights, in float32, in evaluation mode, without gradients.

    Raises:
        CheckpointError: the file cannot be read, or holds another model's weights.
    """
    model = build_model(source.model)
    weights = find_model_weights(source.weights, source.model, model.state_dict(), source.prefix)
    if BIAS in weights.state:
        model.logit_bias = nn.Parameter(torch.zeros(1))
    for note in filter(None, (weights.note, *fit_weights(model, weights.state, weights.source))):
        log.warning(note)
    if source.mix is not None:
        tuned = {name: value.clone() for name, value in model.state_dict().items()}
        load_weights(model, source.mix.start, source.model, source.mix.prefix)
        model.load_state_dict(interpolate(model.state_dict(), tuned, source.mix.share))
    return model.to(device).eval().requires_grad_(False)
