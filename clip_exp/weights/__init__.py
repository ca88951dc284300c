"""Weights of clip_exp and of other libraries, in files and in memory."""

from clip_exp.weights.files import load_weights, read_weights
from clip_exp.weights.open_clip import from_open_clip, to_open_clip

__all__ = ["from_open_clip", "load_weights", "read_weights", "to_open_clip"]
