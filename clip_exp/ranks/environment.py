"""Who started this process, read from its environment; without torch, for the checks before it is imported."""

import os
import socket


def is_first_rank() -> bool:
    """Return whether this process writes files and messages: rank 0, or a process that is no rank."""
    number = os.environ.get("RANK")
    if number is None and outer_ranks():  # of srun, which sets no RANK
        number = os.environ.get("SLURM_PROCID")
    return (number or "0") == "0"


def outer_ranks() -> int | None:
    """Processes of the run that torchrun, srun or our own launcher started; None if this process was started alone.

    `WORLD_SIZE` or `SLURM_NTASKS` by themselves say nothing: they are left over in shells and in batch scripts.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    if os.environ.get("SLURM_STEP_ID", "").isdecimal() and int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        return int(os.environ["SLURM_NTASKS"])
    return None


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


def _slurm_tasks_here() -> str:
    """Tasks on this machine, of `SLURM_STEP_TASKS_PER_NODE` as in "4(x2),3"; srun fills equal machines alike."""
    listed = os.environ.get("SLURM_STEP_TASKS_PER_NODE") or os.environ["SLURM_NTASKS"]
    return listed.split("(")[0].split(",")[0]


def slurm_environment() -> dict[str, str]:
    """The same from srun's variables."""
    from pytorch_lightning.plugins.environments import SLURMEnvironment

    slurm = SLURMEnvironment()
    return {
        "RANK": os.environ["SLURM_PROCID"],
        "LOCAL_RANK": os.environ["SLURM_LOCALID"],
        "NODE_RANK": os.environ["SLURM_NODEID"],
        "LOCAL_WORLD_SIZE": _slurm_tasks_here(),
        "WORLD_SIZE": os.environ["SLURM_NTASKS"],
        "MASTER_ADDR": slurm.main_address,
        "MASTER_PORT": str(slurm.main_port),
    }
