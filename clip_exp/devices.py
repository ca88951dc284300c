"""What the keys `accelerator`, `devices` and `precision` of a configuration mean on this machine: a type of device, a number of
processes, GPUs, and the floating-point type that towers run in; torch's process-wide switches of precision; and the number of cores.

The text of the values is checked without torch, so that a typo is reported at once: only functions that need it import it.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from clip_exp.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import nn

# In the words of CUDA and NCCL, of torch's CPU allocator, and of cuDNN and cuBLAS.
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "STATUS_ALLOC_FAILED")
ACCELERATORS = ("auto", "cpu", "gpu", "cuda")  # cuda is gpu


@dataclass(frozen=True)
class Devices:
    """Devices that a configuration requests on each machine, one process per device; made by `parse_devices`."""

    accelerator: str
    requested: int | None  # processes; None: one per GPU of the machine, or one on a CPU
    gpus: list[int] | None  # indices of the GPUs to use; None: the first `requested`
    keys: str  # prefix of the keys in messages
    value: str  # of `devices`, for messages

    def check_gpus(self) -> None:
        """Raise a ConfigError where this machine lacks the GPUs. Imports torch only where GPUs are needed or may be too few."""
        named = self.accelerator in ("gpu", "cuda")
        several = self.gpus is not None or (self.requested or 1) > 1
        if self.accelerator == "cpu" or not (named or several):
            return
        import torch

        found = torch.cuda.device_count()
        if found == 0 and named:
            raise ConfigError(_no_gpu(self.accelerator, self.keys))
        if self.gpus is not None and found == 0:
            raise ConfigError(f"{self.value} lists GPUs, but torch finds no GPU: on a CPU give a number.")
        if self.gpus is not None and max(self.gpus) >= found:
            raise ConfigError(f"{self.value} must be indices from 0 to {found - 1}: this machine has {found} GPUs.")
        if 0 < found < (self.requested or 1):
            raise ConfigError(f"{self.value} asks for {self.requested} GPUs, and this machine has {found}.")

    def count(self) -> int:
        """Return the number of processes on this machine; imports torch where its GPUs decide."""
        if self.requested is not None:
            return self.requested
        if self.accelerator == "cpu":
            return 1
        import torch

        return max(1, torch.cuda.device_count())

    def environment(self) -> dict[str, str]:
        """Return the variables by which a process sees only the listed GPUs, of those that this process sees."""
        if self.gpus is None:
            return {}
        visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        return {"CUDA_VISIBLE_DEVICES": ",".join(visible[index] if visible else str(index) for index in self.gpus)}


def parse_devices(accelerator: str, devices: Any, keys: str = "") -> Devices:
    """Parse the values of `accelerator` and `devices`, without torch.

    Args:
        accelerator: auto (a GPU where there is one), cpu or gpu.
        devices: auto or -1, a number of processes, or a list of distinct GPU indices.
        keys: prefix of the two keys' names in messages, such as "trainer.".
    Raises:
        ConfigError: a line for every problem.
    """
    problems: list[str] = []
    requested, gpus = None, None
    value = f"{keys}devices={devices}"
    try:
        check_accelerator(accelerator, keys)
    except ConfigError as error:
        problems.append(str(error))
    indices = isinstance(devices, list) and all(isinstance(device, int) and device >= 0 for device in devices)
    if indices and devices and len({*devices}) == len(devices):
        requested, gpus = len(devices), devices
        if accelerator == "cpu":
            problems.append(f"{value} lists GPUs: on a CPU give a number.")
    elif str(devices).isdecimal() and int(devices) > 0:
        requested = int(devices)
    elif str(devices) not in ("auto", "-1"):
        problems.append(f"{value} must be auto, a number above 0, or a list of distinct GPU indices.")
    if problems:
        raise ConfigError("\n".join(problems))
    return Devices(accelerator, requested, gpus, keys, value)


def check_accelerator(accelerator: str, keys: str = "") -> None:
    """Raise a ConfigError where the name of an accelerator is unknown, without torch."""
    if accelerator not in ACCELERATORS:
        raise ConfigError(f"{keys}accelerator={accelerator} must be one of {', '.join(ACCELERATORS)}.")


def resolve_accelerator(accelerator: str, keys: str = "") -> str:
    """Return the type of torch device that an accelerator is on this machine, `cpu` or `cuda`; imports torch.

    Args:
        keys: prefix of the key's name in messages, such as "trainer.".
    Raises:
        ConfigError: an unknown accelerator, or no GPU.
    """
    check_accelerator(accelerator, keys)
    if accelerator == "cpu":
        return "cpu"
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if accelerator == "auto":
        return "cpu"
    raise ConfigError(_no_gpu(accelerator, keys))


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
    import torch

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
    import torch

    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions


@contextmanager
def inference(precision: str, device: "torch.device") -> Iterator[None]:
    """Run towers without gradients, in `precision`. 32-true is exact float32, also inside another autocast."""
    import torch

    low = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    with torch.no_grad(), exact_float32(), torch.autocast(device.type, low, enabled=low is not None):
        yield


def benchmarks_convolutions(image_tower: "nn.Module", device_type: str, deterministic: bool) -> bool:
    """Return whether training sets `torch.backends.cudnn.benchmark`: cuDNN times its algorithms for each new shape.

    It pays where images, always of one size, pass many convolutions; a ViT has one, which cuts the patches. The fastest
    algorithm, and with it the last bits of a run, may differ from process to process: not under `trainer.deterministic`.
    """
    from torch import nn

    convolutions = sum(isinstance(module, nn.Conv2d) for module in image_tower.modules())
    return device_type == "cuda" and not deterministic and convolutions > 1


def _gpu_has_bfloat16() -> bool:
    import torch

    return torch.cuda.is_bf16_supported(including_emulation=False)


def usable_cores() -> int:
    """Return the number of cores that this process may use.

    It is limited by the affinity (taskset, SLURM), the CPU quota of a container (docker's `--cpus`, Kubernetes' limits) and
    LOKY_MAX_CPU_COUNT.
    """
    import joblib  # 0.2 s, most of it NumPy

    return joblib.cpu_count()


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an allocation failed, on a GPU or on the CPU; without torch, which has one class for GPUs only."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY)


def _no_gpu(accelerator: str, keys: str) -> str:
    return (
        f"{keys}accelerator={accelerator}, but torch finds no GPU: use {keys}accelerator=cpu, "
        "or install the driver and a CUDA build of torch."
    )
