"""Verification of an export: the written files are loaded, and their features are compared with those of the model."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from clip_exp.config.model import ModelConfig
from clip_exp.errors import CheckpointError
from clip_exp.models.clip import CLIP, unit_norm
from clip_exp.text.tokenizer import build_tokenizer

# Maximum differences of normalized features. In a ViT-B/32, the exact gelu and its tanh approximation differ by 2e-5,
# and another order of the same operations by 1e-7; onnxruntime fuses and approximates more operations.
TOLERANCE, TOLERANCE_ONNX = 1e-5, 1e-4
# The number of texts differs from the batch size that an export is traced with.
TEXTS = ["a photo of a cat", "two dogs run along the beach", "7"]


class Encoders(NamedTuple):
    """Towers of an exported model.

    Attributes:
        image: function of normalized images [B, 3, S, S] that returns features [B, D].
        text: function of tokens [B, L] that returns features [B, D].
    """

    image: Callable[[Tensor], Tensor]
    text: Callable[[Tensor], Tensor]


def difference(model: CLIP, written: Encoders, config: ModelConfig) -> float:
    """Return the largest difference between normalized features of a model and its export."""
    image_BCHW, tokens_BL = sample_input(config)
    with torch.no_grad():
        pairs = [
            (model.encode_image(image_BCHW, normalize=True), written.image(image_BCHW)),
            (model.encode_text(tokens_BL, normalize=True), written.text(tokens_BL)),
        ]
    return max((unit_norm(found_BD) - expected_BD).abs().max().item() for expected_BD, found_BD in pairs)


def require_same(model: CLIP, written: Encoders, config: ModelConfig, tolerance: float = TOLERANCE) -> float:
    """Check that the features of a model and its export are equal up to `tolerance`, and return the largest difference.

    Raises:
        CheckpointError: the difference is larger than the tolerance.
    """
    found = difference(model, written, config)
    if not found <= tolerance:
        raise CheckpointError(
            f"the features of the exported model differ from the model's by {found:.1e}, more than {tolerance:.0e}, so the export was "
            "discarded. Write to another disk, or export in another format."
        )
    return found


def sample_input(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Return random images, and short texts padded to the context length, which is valid input for every tower."""
    size = config.image.image_size
    image_BCHW = torch.randn(len(TEXTS), 3, size, size, generator=torch.Generator().manual_seed(0))
    tokenizer = build_tokenizer(config.text)
    return image_BCHW, tokenizer.pad(tokenizer.encode_batch(TEXTS), multiple=config.text.context_length)
