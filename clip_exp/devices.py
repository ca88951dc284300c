"""Devices, precision and CPU cores: resolves the keys `accelerator`, `devices` and `precision` of a configuration on this machine.

Values are parsed without torch, so that typos are reported immediately. Functions that need torch import it.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clip_exp.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import nn

# Parts of messages of CUDA and NCCL, of torch's CPU allocator, and of cuDNN and cuBLAS
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "STATUS_ALLOC_FAILED")
# cuda is the same as gpu
ACCELERATORS = ("auto", "cpu", "gpu", "cuda")


@dataclass(frozen=True)
class Devices:
    """Devices that a configuration requests on each machine, with one process per device; created by `parse_devices`.

    Attributes:
        accelerator: auto, cpu, gpu or cuda.
        requested: number of processes; None: one per GPU of the machine, or one on a CPU.
        gpus: indices of the GPUs to use; None: the first `requested` GPUs.
        keys: prefix of the keys in messages.
        value: key and value of `devices`, for messages.
    """

    accelerator: str
    requested: int | None
    gpus: list[int] | None
    keys: str
    value: str

    def check_gpus(self) -> None:
        """Check that this machine has the requested GPUs. Imports torch only if GPUs are requested or several processes may need them.

        Raises:
            ConfigError: a GPU is missing.
        """
        named = self.accelerator in ("gpu", "cuda")
        several = self.gpus is not None or (self.requested or 1) > 1
        if self.accelerator == "cpu" or not (named or several):
            return
        import torch

        found = torch.cuda.device_count()
        if found == 0 and named:
            raise ConfigError(_no_gpu(self.accelerator, self.keys))
        if self.gpus is not None and found == 0:
            raise ConfigError(
                f"{self.value} lists GPUs, but torch finds no GPU: set a number of CPU processes instead."
            )
        if self.gpus is not None and max(self.gpus) >= found:
            raise ConfigError(f"{self.value} must be indices from 0 to {found - 1}: this machine has {found} GPUs.")
        if 0 < found < (self.requested or 1):
            raise ConfigError(f"{self.value} requests {self.requested} GPUs, but this machine has {found}.")

    def count(self) -> int:
        """Return the number of processes on this machine. Imports torch only if the number of GPUs matters."""
        if self.requested is not None:
            return self.requested
        if self.accelerator == "cpu":
            return 1
        import torch

        return max(1, torch.cuda.device_count())

    def environment(self) -> dict[str, str]:
        """Return environment variables that restrict a child process to the listed GPUs, out of those visible to this process."""
        if self.gpus is None:
            return {}
        visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        return {"CUDA_VISIBLE_DEVICES": ",".join(visible[index] if visible else str(index) for index in self.gpus)}


def parse_devices(accelerator: str, devices: Any, keys: str = "") -> Devices:
    """Parse the values of `accelerator` and `devices`, without torch.

    Args:
        accelerator: auto (a GPU if there is one), cpu, gpu or cuda.
        devices: auto or -1, a number of processes, or a list of distinct GPU indices.
        keys: prefix of the two keys in messages, such as "trainer.".

    Raises:
        ConfigError: one line for every problem.
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
            problems.append(f"{value} lists GPUs, but {keys}accelerator=cpu: set a number of CPU processes instead.")
    elif str(devices).isdecimal() and int(devices) > 0:
        requested = int(devices)
    elif str(devices) not in ("auto", "-1"):
        problems.append(f"{value} must be auto, a number greater than 0, or a list of distinct GPU indices.")
    if problems:
        raise ConfigError("\n".join(problems))
    return Devices(accelerator, requested, gpus, keys, value)


def check_accelerator(accelerator: str, keys: str = "") -> None:
    """Raise a ConfigError if the name of an accelerator is unknown. Does not import torch."""
    if accelerator not in ACCELERATORS:
        raise ConfigError(f"{keys}accelerator={accelerator} must be one of {', '.join(ACCELERATORS)}.")


def resolve_accelerator(accelerator: str, keys: str = "") -> str:
    """Return the torch device type of an accelerator on this machine, `cpu` or `cuda`. Imports torch.

    Args:
        accelerator: auto (a GPU if there is one), cpu, gpu or cuda.
        keys: prefix of the key in messages, such as "trainer.".

    Raises:
        ConfigError: the accelerator is unknown, or there is no GPU.
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
    """Return the precision for training; `auto` is bf16 if the device supports it well, else float16 on GPUs and float32 on CPUs.

    CPUs without AMX compute bf16 slower than float32.

    Raises:
        ConfigError: float16 was requested on a CPU.
    """
    if precision == "16-mixed" and device_type == "cpu":
        raise ConfigError("precision=16-mixed is not supported on a CPU: use precision=auto.")
    if precision != "auto":
        return precision
    if device_type == "cuda":
        return "bf16-mixed" if _gpu_has_bfloat16() else "16-mixed"
    import torch

    return "bf16-mixed" if torch.backends.cpu.get_cpu_capability() == "AMX" else "32-true"


def inference_precision(precision: str, device_type: str) -> str:
    """Return the precision for inference; `auto` is bf16 on GPUs that support it, else float32, which does not overflow."""
    if precision != "auto":
        return precision
    return "bf16-mixed" if device_type == "cuda" and _gpu_has_bfloat16() else "32-true"


@contextmanager
def exact_float32() -> Iterator[None]:
    """Compute float32 matrix products and convolutions in float32 instead of TF32; also usable as a decorator.

    Training allows TF32 for matrix products, and cuDNN uses it for convolutions by default, so features would differ by
    about 1e-3 from those of a CPU. Both settings are part of torch's older API, which must not be mixed with
    `fp32_precision`.
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
    """Disable gradients and compute in `precision`. 32-true is exact float32, also inside another autocast."""
    import torch

    low = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    with torch.no_grad(), exact_float32(), torch.autocast(device.type, low, enabled=low is not None):
        yield


def benchmarks_convolutions(image_tower: "nn.Module", device_type: str, deterministic: bool) -> bool:
    """Return True if training should set `torch.backends.cudnn.benchmark`, with which cuDNN times its algorithms for each new shape.

    It pays off for many convolutions of the same shape; a ViT has only one, for the patches. The fastest algorithm, and
    thus rounding errors of a run, may differ between processes, so it is off with `trainer.deterministic`.
    """
    from torch import nn

    convolutions = sum(isinstance(module, nn.Conv2d) for module in image_tower.modules())
    return device_type == "cuda" and not deterministic and convolutions > 1


def _gpu_has_bfloat16() -> bool:
    import torch

    return torch.cuda.is_bf16_supported(including_emulation=False)


CGROUPS = Path("/sys/fs/cgroup")
# Files with the memory limit and the used memory of a container, and the entry of `memory.stat` for file pages that can be
# dropped, which count as used: control groups 2 and 1
MEMORY_LIMITS = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
)


def free_memory() -> int:
    """Return the free host memory in bytes, within the limit of the container."""
    import psutil

    free = int(psutil.virtual_memory().available)
    for limit, used, droppable in MEMORY_LIMITS:
        with suppress(OSError, ValueError, KeyError):  # no such file, or no limit ("max")
            stat = dict(line.split() for line in (CGROUPS / limit).with_name("memory.stat").read_text().splitlines())
            in_use = int((CGROUPS / used).read_text()) - int(stat[droppable])
            free = min(free, int((CGROUPS / limit).read_text()) - in_use)
    return free


def usable_cores() -> int:
    """Return the number of CPU cores that this process may use.

    The affinity (taskset, SLURM), the CPU quota of a container (Docker's `--cpus`, Kubernetes' limits) and
    LOKY_MAX_CPU_COUNT limit it.
    """
    # Takes 0.2 s, most of it for NumPy
    import joblib

    return joblib.cpu_count()


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if an error is a failed allocation on a GPU or the CPU. Does not import torch, which has a class for GPUs only."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY)


def _no_gpu(accelerator: str, keys: str) -> str:
    return (
        f"{keys}accelerator={accelerator}, but torch finds no GPU: use {keys}accelerator=cpu, "
        "or install the driver and a CUDA build of torch."
    )
