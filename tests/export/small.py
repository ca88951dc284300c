"""Small models of every family for tests of exports, and input for them."""

from pathlib import Path

import torch
from torch import Tensor

from clip_exp.config.model import Activation, Cleaning, ModelConfig, ResizeMode
from clip_exp.config.names import named_model
from clip_exp.models.clip import CLIP, build_model
from clip_exp.models.families.clip import CLIPTextConfig, ResNetConfig
from clip_exp.models.families.siglip import SigLIPImageConfig, SigLIPTextConfig
from tests.encoders import write_siglip_tokenizer

TEXTS = ["a photo of a cat", "a dog, running on grass", "the digit 7", "a red square left of a green circle"]


def vit(activation: Activation | None = None) -> ModelConfig:
    config = named_model("vit_nano")
    config.activation = activation
    return config


def resnet() -> ModelConfig:
    image = ResNetConfig(image_size=64, stages=[1, 2, 1, 1], width=16, heads=4)
    text = CLIPTextConfig(width=64, layers=2, heads=2)
    return ModelConfig(name="rn_nano", embed_dim=48, image=image, text=text)


def siglip(tokenizer_folder: Path) -> ModelConfig:
    """Return a SigLIP configuration with a custom tokenizer, which is written to `tokenizer_folder`."""
    write_siglip_tokenizer(tokenizer_folder)
    image = SigLIPImageConfig(
        image_size=32,
        patch_size=8,
        width=64,
        layers=2,
        heads=4,
        mean=[0.5, 0.5, 0.5],
        std=[0.5, 0.5, 0.5],
        resize_mode=ResizeMode.squash,
    )
    text = SigLIPTextConfig(
        context_length=16,
        vocab_size=300,
        width=64,
        layers=2,
        heads=4,
        tokenizer=str(tokenizer_folder),
        cleaning=Cleaning.canonicalize,
    )
    return ModelConfig(name="siglip_nano", embed_dim=64, image=image, text=text)


def build(config: ModelConfig, bias: float | None = None) -> CLIP:
    """Return the model with random biases, norms and statistics, since the initial ones have no effect."""
    torch.manual_seed(0)
    model = build_model(config, init_logit_bias=bias)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.ndim == 1 and tensor.is_floating_point() and not name.startswith("logit"):
                tensor.add_(0.1 * torch.rand(tensor.shape, generator=draw))
    return model.eval().requires_grad_(False)


def images(config: ModelConfig, count: int = 3) -> Tensor:
    size = config.image.image_size
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(2))
