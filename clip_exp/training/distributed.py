"""The process group of a run: who this process is, and one group for whatever strategy follows."""

import os
import socket
from datetime import timedelta

import torch
import torch.distributed as dist

from clip_exp.errors import DistributedError


def launched_from_outside() -> bool:
    """Whether torchrun, srun or our own launcher started this process as one rank of several."""
    return "RANK" in os.environ or (int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in os.environ)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def rank_environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What a rank on this machine is told through its environment."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "NODE_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def start(device_type: str, timeout_s: int) -> None:
    """Join the process group that the environment describes; without one, a group of this process alone.

    Collectives on CPU tensors go through gloo, those on CUDA tensors through nccl.

    Raises:
        DistributedError: the other ranks did not come within `timeout_s` seconds.
    """
    if dist.is_initialized():
        return
    if "RANK" not in os.environ:
        os.environ.update(_slurm_environment() if "SLURM_PROCID" in os.environ else rank_environment(0, 1, free_port()))
    backend = "gloo"
    if device_type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    except (dist.DistError, RuntimeError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise DistributedError(
            f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} could not meet the others at {where}: {error}"
        ) from error


def _slurm_environment() -> dict[str, str]:
    from pytorch_lightning.plugins.environments import SLURMEnvironment

    slurm = SLURMEnvironment()
    return {
        "RANK": os.environ["SLURM_PROCID"],
        "LOCAL_RANK": os.environ["SLURM_LOCALID"],
        "NODE_RANK": os.environ["SLURM_NODEID"],
        "WORLD_SIZE": os.environ["SLURM_NTASKS"],
        "MASTER_ADDR": slurm.main_address,
        "MASTER_PORT": str(slurm.main_port),
    }


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
