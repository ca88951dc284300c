"""Dual encoders in plain torch. Read in this order: layers, vit, text, clip, build; then the other towers.

Names of tensors end in their axes: B batch, C channels, H height, W width, N tokens of a picture or a text, L tokens of a
text, D width of a tower or of the shared space, A attention heads, E width of a head.
"""

from clip_exp.models.build import build_model
from clip_exp.models.clip import CLIP
from clip_exp.models.text import TextTransformer
from clip_exp.models.vit import VisionTransformer

__all__ = ["CLIP", "TextTransformer", "VisionTransformer", "build_model"]
