"""Precision in which towers run: what `auto` means on a device, and the autocast context of a precision."""

import torch

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


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Return the context in which a tower runs; disabled for 32-true, also inside another autocast."""
    return torch.autocast(device.type, LOW_PRECISION.get(precision), enabled=precision in LOW_PRECISION)


def _gpu_has_bfloat16() -> bool:
    return torch.cuda.is_bf16_supported(including_emulation=False)
