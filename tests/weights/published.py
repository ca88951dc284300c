"""Small versions of published models, and their files."""

import copy
import pickle
import warnings
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.transformer import LayerNorm
from torch import Tensor, nn

from clip_exp.config.model import Activation, ModelConfig
from clip_exp.models.families.clip import CLIPTextConfig, ResNetConfig, ViTConfig

CONTEXT, VOCABULARY, EMBED_DIM, HEAD = 16, 500, 40, 64
TEXT = {"context_length": CONTEXT, "vocab_size": VOCABULARY, "width": HEAD, "layers": 2, "heads": 1}
VIT = {"image_size": 32, "patch_size": 8, "width": HEAD, "layers": 2}
RESNET = {"image_size": 64, "layers": (1, 2, 1, 1), "width": 8}


def openai_model(image: str = "vit", quick_gelu: bool = True) -> nn.Module:
    """Return open_clip's model with OpenAI's shapes and random weights, in float16 except for the norms."""
    torch.manual_seed(0)
    vision = VIT if image == "vit" else RESNET
    model = open_clip.CLIP(EMBED_DIM, vision, TEXT, quick_gelu=quick_gelu).eval()
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2.0)
    for parameter in model.parameters():
        parameter.copy_((parameter + 0.02 * torch.randn_like(parameter)).half())
    return model


def our_config(image: str = "vit", activation: Activation | None = Activation.quick_gelu) -> ModelConfig:
    """Return our configuration of `openai_model`."""
    vit = ViTConfig(image_size=32, patch_size=8, width=HEAD, layers=2, heads=1)
    resnet = ResNetConfig(image_size=64, stages=[1, 2, 1, 1], width=8, heads=4)
    return ModelConfig(
        name="small",
        embed_dim=EMBED_DIM,
        image=vit if image == "vit" else resnet,
        text=CLIPTextConfig(**TEXT),
        activation=activation,
    )


def inputs(size: int = 3, image_size: int = 32) -> tuple[Tensor, Tensor]:
    """Return images, and texts of different lengths that end with the highest id."""
    draw = torch.Generator().manual_seed(1)
    image_BCHW = torch.randn(size, 3, image_size, image_size, generator=draw)
    tokens_BL = torch.zeros(size, CONTEXT, dtype=torch.int64)
    for i, row_L in enumerate(tokens_BL):
        row_L[: 4 + i] = torch.randint(1, VOCABULARY - 1, [4 + i], generator=draw)
        row_L[4 + i] = VOCABULARY - 1
    return image_BCHW, tokens_BL


@torch.no_grad()
def logits(model: nn.Module, image_BCHW: Tensor, tokens_BL: Tensor) -> Tensor:
    """Return the logits [B, B] of a model of open_clip or of ours."""
    image_BD, text_BD = model.encode_image(image_BCHW, normalize=True), model.encode_text(tokens_BL, normalize=True)
    return model.logit_scale.exp() * image_BD @ text_BD.T


def write_openai_archive(model: nn.Module, path: Path) -> None:
    """Write a TorchScript archive like OpenAI's: traced, in float16 except for the norms, with three additional numbers."""
    model = copy.deepcopy(model)
    size = model.visual.image_size
    size = size[0] if isinstance(size, tuple) else size
    for name, number in (("input_resolution", size), ("context_length", CONTEXT), ("vocab_size", VOCABULARY)):
        model.__dict__.pop(name, None)
        model.register_buffer(name, torch.tensor(number))
    model.__dict__["attn_mask"] = model._buffers.pop("attn_mask")  # no buffer of OpenAI's
    example = (torch.ones(2, 3, size, size), torch.zeros(2, CONTEXT, dtype=torch.int32))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.jit, which is deprecated but what the archives are made with
        methods = {"forward": example, "encode_image": example[:1], "encode_text": example[1:]}
        traced = torch.jit.trace_module(model, methods)
        norms = {
            f"{name}.{parameter}"
            for name, module in model.named_modules()
            if isinstance(module, LayerNorm | nn.BatchNorm2d)
            for parameter in ("weight", "bias")
        }
        for name, parameter in traced.named_parameters():
            if name not in norms:
                parameter.data = parameter.data.half()
        traced.save(str(path))


def jit_state_dict(path: Path) -> dict[str, Tensor]:
    """Read an archive with torch, which executes its program."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.load(path).state_dict()


def write_archive(path: Path, pickled: bytes, records: dict[str, bytes], **options: Any) -> None:
    """Write a handmade TorchScript archive."""
    with zipfile.ZipFile(path, "w", **options) as archive:
        members = {"data.pkl": pickled, "constants.pkl": pickle.dumps((), protocol=2), "version": b"3\n"}
        for name, content in (members | records).items():
            archive.writestr(f"archive/{name}", content)


class Storage:
    """Storage in a handmade pickle."""

    def __init__(self, key: str, numel: int, kind: Any = torch.FloatStorage) -> None:
        self.pid = ("storage", kind, key, "cpu", numel)


class Stored:
    """Tensor in a handmade pickle."""

    def __init__(self, storage: Storage, size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> None:
        self.arguments = (storage, offset, size, stride, False, {})

    def __reduce__(self) -> tuple[Any, ...]:
        return torch._utils._rebuild_tensor_v2, self.arguments


class ArchivePickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        return value.pid if isinstance(value, Storage) else None


def pickled(value: Any, protocol: int = 2) -> bytes:
    """Pickle an object like the `data.pkl` of an archive."""
    buffer = BytesIO()
    ArchivePickler(buffer, protocol=protocol).dump(value)
    return buffer.getvalue()
