"""Towers under autocast: what a CPU computes says something about a GPU, and norms lose nothing by bf16."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clip_exp.models.clip import CLIP, build_model
from clip_exp.models.layers import LayerNorm
from tests.compose import train_config
from tests.fake_cuda import autocast, fake_model, fake_tensors
from tests.models.small import batch, small_config

LOW = (torch.bfloat16, torch.float16)


def output_dtypes(model: CLIP, device: str, image_BCHW: Tensor, tokens_BL: Tensor, low: torch.dtype) -> dict:
    """The dtype of every module's output under autocast, by the module's name."""
    seen: dict[str, torch.dtype] = {}

    def note(name: str):
        return lambda module, inputs, output: seen.update({name: output.dtype})

    for name, module in model.named_modules():
        if name:
            module.register_forward_hook(note(name))
    with autocast(device, low):
        output = model(image_BCHW, tokens_BL)
    return {**seen, **{name: value.dtype for name, value in output._asdict().items() if isinstance(value, Tensor)}}


@pytest.mark.parametrize("low", LOW)
@pytest.mark.parametrize(
    "overrides",
    [
        ["model=vit_nano"],
        ["model=rn50", "model.image.stages=[1,1,1,1]", "model.text.layers=2"],
        ["model=siglip_b16", "model.image.layers=2", "model.text.layers=2"],
    ],
    ids=lambda overrides: overrides[0],
)
def test_under_autocast_every_module_computes_in_the_same_dtype_on_cpu_and_cuda(
    overrides: list[str], low: torch.dtype
) -> None:
    config = train_config(*overrides).model
    dtypes = {}
    for device in ("cpu", "cuda"):
        with fake_tensors(), torch.device(device):
            image_BCHW = torch.zeros(2, 3, config.image.image_size, config.image.image_size)
            tokens_BL = torch.zeros(2, config.text.context_length, dtype=torch.int64)
            dtypes[device] = output_dtypes(fake_model(config, device), device, image_BCHW, tokens_BL, low)
    assert dtypes["cuda"] == dtypes["cpu"]
    residual = {name: dtype for name, dtype in dtypes["cuda"].items() if name.endswith("transformer.blocks.1")}
    assert residual.pop("text.transformer.blocks.1") == torch.float32  # as its embeddings are
    assert set(residual.values()) <= {low}


def test_a_norm_takes_its_statistics_in_float32_and_returns_the_dtype_of_its_input() -> None:
    norm = LayerNorm(64)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x_BD = (3 + torch.randn(8, 64)).bfloat16()
    exact_BD = F.layer_norm(x_BD.float(), [64], norm.weight, norm.bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(norm(x_BD), exact_BD.bfloat16())
        assert norm(x_BD.float()).dtype == torch.float32


def test_in_float32_norms_are_those_of_torch_bit_by_bit() -> None:
    torch.manual_seed(0)
    model = build_model(small_config())
    ours = model(*batch(4))
    for module in model.modules():
        if isinstance(module, LayerNorm):
            module.__class__ = nn.LayerNorm
    theirs = model(*batch(4))
    assert torch.equal(ours.image_features, theirs.image_features)
    assert torch.equal(ours.text_features, theirs.text_features)


ROUNDED = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize("log_scale", [2.659260036932778, 4.6])
def test_the_scale_of_a_rounded_model_is_not_rounded_again(log_scale: float, dtype: torch.dtype) -> None:
    model = build_model(small_config(), init_logit_scale=log_scale).to(dtype)
    image_BCHW, tokens_BL = batch(2)
    scale = model(image_BCHW.to(dtype), tokens_BL).logit_scale
    assert scale.dtype == torch.float32
    assert scale.item() == model.logit_scale.detach().double().exp().float().item()


@pytest.mark.parametrize("dtype", ROUNDED)
def test_scale_and_bias_of_a_rounded_model_are_the_exact_ones_where_it_has_them(dtype: torch.dtype) -> None:
    whole = build_model(small_config(), init_logit_scale=2.66, init_logit_bias=-9.99)
    exact = {"logit_scale": whole.logit_scale.detach().clone(), "logit_bias": whole.logit_bias.detach().clone()}
    model = whole.to(dtype)
    model.exact = exact
    image_BCHW, tokens_BL = batch(2)
    output = model(image_BCHW.to(dtype), tokens_BL)
    assert torch.equal(output.logit_scale, exact["logit_scale"].exp())
    assert torch.equal(output.logit_bias, exact["logit_bias"])
    (output.logit_scale + output.logit_bias).backward()
    assert model.logit_scale.grad.item() == pytest.approx(exact["logit_scale"].exp().item(), rel=0.005)
    assert model.logit_bias.grad.item() == 1
