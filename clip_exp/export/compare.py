"""Whether the files of an export give the model's features: read back and asked, before the folder appears."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from clip_exp.config.model import ModelConfig
from clip_exp.errors import CheckpointError
from clip_exp.models.clip import CLIP, unit_norm
from clip_exp.text.tokenizer import build_tokenizer

# Of a feature of unit norm. The exact gelu and its approximation by tanh differ by 2e-5 in a ViT-B/32, the same
# functions in another order by 1e-7; onnxruntime fuses and approximates more.
TOLERANCE, TOLERANCE_ONNX = 1e-5, 1e-4
TEXTS = ["a photo of a cat", "two dogs run along the beach", "7"]  # not as many as an export is traced with


class Encoders(NamedTuple):
    """Two towers that were read back."""

    image: Callable[[Tensor], Tensor]  # normalised images [B, 3, S, S] to [B, D]
    text: Callable[[Tensor], Tensor]  # tokens [B, L] to [B, D]


def difference(model: CLIP, written: Encoders, config: ModelConfig) -> float:
    """The largest difference of a feature of unit norm between the model and what was written of it."""
    image_BCHW, tokens_BL = sample_input(config)
    with torch.no_grad():
        pairs = [
            (model.encode_image(image_BCHW, normalize=True), written.image(image_BCHW)),
            (model.encode_text(tokens_BL, normalize=True), written.text(tokens_BL)),
        ]
    return max((unit_norm(found_BD) - expected_BD).abs().max().item() for expected_BD, found_BD in pairs)


def require_same(model: CLIP, written: Encoders, config: ModelConfig, tolerance: float = TOLERANCE) -> float:
    """`difference`, which must be small.

    Raises:
        CheckpointError: what was written is another model.
    """
    found = difference(model, written, config)
    if not found <= tolerance:
        raise CheckpointError(
            f"the files that were written give other features than the model (by {found:.1e}, above {tolerance:.0e}): "
            "nothing is left of them. Write to another disk, or export in another format."
        )
    return found


def sample_input(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Images of noise, and short texts padded to the whole context, which every tower takes."""
    size = config.image.image_size
    image_BCHW = torch.randn(len(TEXTS), 3, size, size, generator=torch.Generator().manual_seed(0))
    tokenizer = build_tokenizer(config.text)
    return image_BCHW, tokenizer.pad(tokenizer.encode_batch(TEXTS), multiple=config.text.context_length)
