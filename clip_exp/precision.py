"""Precision in which towers run: what `auto` means on a device, and torch's process-wide switches of precision."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from clip_exp.errors import ConfigError

LOW_PRECISION = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def training_precision(precision: str, device_type: str) -> str:
    """Return the precision to train in; `auto` is bf16 where the device has it, else float16 on GPUs and float32 on CPUs.

    A CPU without AMX computes bf16 slower than float32.

    Raises:
        ConfigError: float16 on a CPU.
    """
    if precision == "16-mixed" and device_type == "cpu":
        raise ConfigError("precision=16-mixed does not train on a CPU: use precision=auto.")
    if precision != "auto":
        return precision
    if device_type == "cuda":
        return "bf16-mixed" if _gpu_has_bfloat16() else "16-mixed"
    return "bf16-mixed" if torch.backends.cpu.get_cpu_capability() == "AMX" else "32-true"


def inference_precision(precision: str, device_type: str) -> str:
    """Return the precision to encode in; `auto` is bf16 on GPUs that have it, else float32, which needs no care for overflows."""
    if precision != "auto":
        return precision
    return "bf16-mixed" if device_type == "cuda" and _gpu_has_bfloat16() else "32-true"


@contextmanager
def exact_float32() -> Iterator[None]:
    """Compute float32 products and convolutions in float32, not in TF32; also usable as a decorator.

    Training allows TF32 for products, and cuDNN uses it for convolutions unless told otherwise: features would differ by
    about 1e-3 from those of a CPU. Both switches are of torch's older API, which must not be mixed with `fp32_precision`.
    """
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions


@contextmanager
def inference(precision: str, device: torch.device) -> Iterator[None]:
    """Run towers without gradients, in `precision`. 32-true is exact float32, also inside another autocast."""
    low = LOW_PRECISION.get(precision)
    with torch.no_grad(), exact_float32(), torch.autocast(device.type, low, enabled=low is not None):
        yield


def benchmarks_convolutions(image_tower: nn.Module, device_type: str, deterministic: bool) -> bool:
    """Return whether training sets `torch.backends.cudnn.benchmark`: cuDNN times its algorithms for each new shape.

    It pays where images, always of one size, pass many convolutions; a ViT has one, which cuts the patches. The fastest
    algorithm, and with it the last bits of a run, may differ from process to process: not under `trainer.deterministic`.
    """
    convolutions = sum(isinstance(module, nn.Conv2d) for module in image_tower.modules())
    return device_type == "cuda" and not deterministic and convolutions > 1


def _gpu_has_bfloat16() -> bool:
    return torch.cuda.is_bf16_supported(including_emulation=False)
