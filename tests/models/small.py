"""A model small enough to train in a test, its twin in open_clip, and batches for both."""

import open_clip
import torch
from torch import Tensor, nn

from clip_exp.config.model import Activation, ModelConfig
from clip_exp.models.clip import CLIP
from clip_exp.models.families.clip import CLIPTextConfig, ViTConfig
from clip_exp.weights.names import to_open_clip

CONTEXT_LENGTH, VOCAB_SIZE = 77, 500


def small_config(activation: Activation = Activation.gelu, dropout: float = 0.0) -> ModelConfig:
    return ModelConfig(
        name="small",
        embed_dim=40,
        image=ViTConfig(image_size=32, patch_size=8, width=64, layers=2, heads=4),
        text=CLIPTextConfig(context_length=CONTEXT_LENGTH, vocab_size=VOCAB_SIZE, width=48, layers=2, heads=3),
        activation=activation,
        dropout=dropout,
    )


def open_clip_twin(model: CLIP, quick_gelu: bool = False) -> nn.Module:
    twin = open_clip.CLIP(
        40,
        {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 16},
        {"context_length": CONTEXT_LENGTH, "vocab_size": VOCAB_SIZE, "width": 48, "layers": 2, "heads": 3},
        quick_gelu=quick_gelu,
    )
    twin.load_state_dict(to_open_clip(model.state_dict()))
    return twin


def batch(size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images, and texts of 3 to 12 tokens padded to the whole context."""
    draw = torch.Generator().manual_seed(seed)
    image_BCHW = torch.randn(size, 3, 32, 32, generator=draw)
    tokens_BL = torch.zeros(size, CONTEXT_LENGTH, dtype=torch.int64)
    for row_L, length in zip(tokens_BL, torch.randint(3, 13, [size], generator=draw).tolist(), strict=True):
        row_L[:length] = torch.randint(1, VOCAB_SIZE - 1, [length], generator=draw)
        row_L[length - 1] = VOCAB_SIZE - 1
    return image_BCHW, tokens_BL


def trim(tokens_BL: Tensor) -> Tensor:
    return tokens_BL[:, : int(tokens_BL.argmax(dim=1).max()) + 1]
