"""Models of conf/model beside open_clip's of the same name: whole, or cut short where depth proves nothing new."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import open_clip
import timm
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from clip_exp.config.base import parse
from clip_exp.config.model import ModelConfig
from clip_exp.models.clip import CLIP, build_model
from clip_exp.weights.names import to_ours

FOLDER = Path(__file__).parents[2] / "conf" / "model"
OURS = ("vit", "resnet", "siglip")
CUT_LAYERS, CUT_VOCABULARY = 2, 1000
# One of each family, and those whose numbers are odd: layers of the MLP that are no multiple, patches of 14 pixels.
REPRESENTATIVES = ("rn50", "vit_b32", "vit_g14", "siglip_b16")


def load_config(name: str) -> ModelConfig:
    values: Any = OmegaConf.to_container(OmegaConf.load(FOLDER / f"{name}.yaml"))
    return parse(ModelConfig, values, "model.")


def names() -> list[str]:
    """The files of conf/model whose towers are ours."""
    files = {file.stem: OmegaConf.load(file) for file in sorted(FOLDER.glob("*.yaml"))}
    kinds = {name: OmegaConf.select(content, "image.kind", default="vit") for name, content in files.items()}
    return [name for name, kind in kinds.items() if kind in OURS and not OmegaConf.is_missing(files[name], "name")]


def names_with_twin() -> list[str]:
    return [name for name in names() if load_config(name).open_clip_name]


def cut(config: ModelConfig) -> ModelConfig:
    """With two layers, or one block in each stage, and few words."""
    config.text.layers, config.text.vocab_size = CUT_LAYERS, CUT_VOCABULARY
    if config.image.kind == "resnet":
        config.image.stages = [1, 1, 1, 1]
    else:
        config.image.layers = CUT_LAYERS
    return config


def settings_of(name: str, *, whole: bool = False) -> dict[str, Any]:
    """open_clip's configuration of the same name, cut as `cut` does."""
    settings: dict[str, Any] = open_clip.get_model_config(load_config(name).open_clip_name)
    if not whole:
        stages = isinstance(settings["vision_cfg"].get("layers"), list)
        settings["vision_cfg"]["layers"] = [1, 1, 1, 1] if stages else CUT_LAYERS
        settings["text_cfg"] |= {"layers": CUT_LAYERS, "vocab_size": CUT_VOCABULARY}
    return settings


def twin_of(name: str, *, whole: bool = False) -> nn.Module:
    """open_clip's model of the same name, cut as `cut` does, as open_clip's factory would build it."""
    settings = settings_of(name, whole=whole)
    custom = settings.pop("custom_text", False)
    with nullcontext() if whole else shallow_timm(depth=CUT_LAYERS):
        return (open_clip.model.CustomTextCLIP if custom else open_clip.CLIP)(**settings)


def shallow_timm(**changes: Any) -> Any:
    """Inside, timm builds its models with these arguments, which open_clip has no way to pass on."""
    create = timm.create_model
    return mock.patch.object(timm, "create_model", lambda *args, **kwargs: create(*args, **kwargs, **changes))


def randomize(model: nn.Module, std: float = 0.02) -> nn.Module:
    """Move every weight off its initial value, and running statistics away from 0 and 1: zeros would hide a wrong place."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(std * torch.randn_like(parameter))
        for name, parameter in model.named_parameters():
            if name.endswith("bn3.weight"):  # zero at first, where a block would be its shortcut
                parameter.uniform_(0.5, 1.0)
        for name, statistic in model.named_buffers():
            if name.endswith("running_mean"):
                statistic.normal_(std=0.1)
            elif name.endswith("running_var"):
                statistic.uniform_(0.5, 1.5)
            elif name.endswith("num_batches_tracked"):
                statistic.fill_(7)
    return model


def with_weights_of(twin: nn.Module, config: ModelConfig) -> CLIP:
    """Our model with the weights of open_clip's."""
    # Weights of our own towers would be drawn in vain; other libraries' have buffers that are not among the weights.
    with torch.device("meta") if config.image.kind in OURS else nullcontext():
        model = build_model(config, init_logit_bias=None if twin.logit_bias is None else 0.0)
    model.load_state_dict(
        {key: value.clone() for key, value in to_ours("open_clip", twin.state_dict()).items()}, assign=True
    )
    for parameter in model.parameters():
        parameter.requires_grad_()
    return model


def inputs(config: ModelConfig, size: int = 2) -> tuple[Tensor, Tensor]:
    """Images, and texts of different lengths that fill the context with padding."""
    image_BCHW = torch.randn(size, 3, config.image.image_size, config.image.image_size)
    vocabulary = getattr(config.text, "vocab_size", 500)  # of the encoders in tests/encoders.py
    tokens_BL = torch.randint(2, vocabulary - 1, (size, config.text.context_length))
    for row_L, length in zip(tokens_BL, range(5, 5 + size), strict=True):
        row_L[length - 1] = vocabulary - 1
        row_L[length:] = 0
    return image_BCHW, tokens_BL
