"""Rank of this process, from its environment variables. No torch, for the checks that run before torch is imported."""

import os
import socket
from collections.abc import Iterator
from typing import NamedTuple

from clip_exp.devices import Devices
from clip_exp.errors import ConfigError, DistributedError


class Placement(NamedTuple):
    """Rank of a process, and the addresses and sizes of its group."""

    launcher: str  # name of the launcher, for messages
    rank: int
    world_size: int
    local_rank: int  # number of the rank on its machine
    local_world_size: int  # ranks on that machine
    nodes: int  # machines
    node_rank: int
    main_address: str
    main_port: int

    def variables(self) -> dict[str, str]:
        """Return the placement as the environment variables that torch.distributed, DeepSpeed and Lightning read."""
        return {
            "RANK": str(self.rank),
            "LOCAL_RANK": str(self.local_rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "NODE_RANK": str(self.node_rank),
            "MASTER_ADDR": self.main_address,
            "MASTER_PORT": str(self.main_port),
        }


def is_first_rank() -> bool:
    """Return True if this process writes files and messages: it is rank 0, or was not started by a launcher. Never raises."""
    if _started_by_torchrun():
        return os.environ["RANK"] == "0"
    return not _started_by_srun() or os.environ.get("SLURM_PROCID", "0") == "0"


def started_by_launcher() -> bool:
    """Return True if torchrun, srun or clip_exp's launcher started this process as a rank. Never raises."""
    return _started_by_torchrun() or _started_by_srun()


def outer_placement() -> Placement | None:
    """Return the placement that torchrun, srun or clip_exp's launcher gave this process; None if it was started alone.

    `WORLD_SIZE` or `SLURM_NTASKS` alone is not enough: shells and batch scripts often contain left-over values. Variables of LSF and MPI
    are ignored, since these are not supported as launchers.

    Raises:
        DistributedError: a variable that the launcher sets is missing or not a number.
    """
    if _started_by_torchrun():
        world_size = _number("WORLD_SIZE")
        local_world_size = _number("LOCAL_WORLD_SIZE", world_size)
        return Placement(
            "torchrun" if "TORCHELASTIC_RUN_ID" in os.environ else "the launcher",
            rank=_number("RANK"),
            world_size=world_size,
            local_rank=_number("LOCAL_RANK", _number("RANK") % local_world_size),
            local_world_size=local_world_size,
            nodes=_number("GROUP_WORLD_SIZE", -(-world_size // local_world_size)),
            node_rank=_number("GROUP_RANK", _number("NODE_RANK", 0)),
            main_address=os.environ.get("MASTER_ADDR", "127.0.0.1"),
            main_port=_number("MASTER_PORT"),
        )
    if not _started_by_srun():
        return None
    tasks = _number("SLURM_STEP_NUM_TASKS", _number("SLURM_NTASKS", 1))
    node = _number("SLURM_NODEID", 0)
    nodes = _number("SLURM_STEP_NUM_NODES", _number("SLURM_NNODES", 1))
    address = os.environ.get("MASTER_ADDR")
    if not address:
        from pytorch_lightning.plugins.environments import SLURMEnvironment  # expands SLURM's lists of machines

        machines = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_NODELIST", "127.0.0.1")
        address = SLURMEnvironment.resolve_root_node_address(machines)
    return Placement(
        "srun",
        rank=_number("SLURM_PROCID"),
        world_size=tasks,
        local_rank=_number("SLURM_LOCALID"),
        local_world_size=_slurm_tasks_per_node(tasks, nodes)[node],
        nodes=nodes,
        node_rank=node,
        main_address=address,
        # Every rank must compute the same port, and two job steps on the same machine must get different ports.
        main_port=_number("MASTER_PORT", 15000 + (_number("SLURM_JOB_ID", 0) + _number("SLURM_STEP_ID")) % 10000),
    )


def local_placement(rank: int, ranks: int, port: int) -> Placement:
    """Return the placement of a rank if all ranks are on this machine."""
    return Placement("clip_exp", rank, ranks, rank, ranks, 1, 0, "127.0.0.1", port)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def device_problems(devices: Devices, num_nodes: int | None = None, keys: str = "") -> Iterator[str]:
    """Yield the problems of the requested devices: too few on this machine, or a contradiction to the launcher of this process.

    Args:
        devices: configured devices.
        num_nodes: configured number of machines; None: that of the launcher.
        keys: prefix of the keys in messages, such as "trainer.".
    """
    placement = outer_placement()
    if placement is None:
        try:
            devices.check_gpus()
        except ConfigError as error:
            yield str(error)
        return
    launcher, here = placement.launcher, placement.local_world_size
    if devices.gpus is not None:
        yield (
            f"{devices.value} lists GPUs, but {launcher} has started the processes: set CUDA_VISIBLE_DEVICES instead, "
            f"and remove {keys}devices."
        )
    elif devices.requested not in (None, here):
        yield (
            f"{devices.value}, but {launcher} has started {here} processes on this machine: start {devices.requested}, "
            f"or remove {keys}devices."
        )
    if num_nodes not in (None, placement.nodes):
        yield (
            f"{keys}num_nodes={num_nodes}, but {launcher} has started {placement.world_size} processes on {placement.nodes} "
            f"machines: remove {keys}num_nodes, or start the command on {num_nodes} machines."
        )


def _started_by_torchrun() -> bool:
    """Return True if torchrun, clip_exp's launcher or another one that sets the same variables started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def _started_by_srun() -> bool:
    """Return True if srun started this process as one of several. A batch script has no step, an interactive step has one task."""
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ.get("SLURM_NTASKS") or "1"
    return os.environ.get("SLURM_STEP_ID", "").isdecimal() and tasks not in ("0", "1")


def _slurm_tasks_per_node(tasks: int, nodes: int) -> list[int]:
    """Return the number of the step's tasks on each node, from SLURM's abbreviated list: "4(x2),3" means 4, 4 and 3."""
    listed = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    per_node: list[int] = []
    for part in filter(None, listed.split(",")):
        count, _, repeated = part.rstrip(")").partition("(x")
        if not count.isdecimal() or not (repeated or "1").isdecimal():
            raise DistributedError(f"SLURM_STEP_TASKS_PER_NODE={listed} is not a list of numbers such as 4(x2),3.")
        per_node += [int(count)] * int(repeated or 1)
    return per_node if len(per_node) == nodes else [-(-tasks // nodes)] * nodes


def _number(name: str, default: int | None = None) -> int:
    """Return an environment variable as an integer; raise a DistributedError if it is not one, or unset without a default."""
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.isdecimal():
        raise DistributedError(
            f"{name}={'' if text is None else text} in the environment must be a non-negative integer. Start the command with torchrun or srun, "
            "or unset RANK and WORLD_SIZE to start it as a single process."
        )
    return int(text)
