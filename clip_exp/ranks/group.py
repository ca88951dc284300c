"""The processes that do a piece of work together: one group for whatever strategy follows. One process alone needs no group."""

import importlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from clip_exp.errors import ClipExpError, DistributedError
from clip_exp.ranks.environment import free_port, outer_ranks, rank_environment, slurm_environment

T = TypeVar("T")
_set_here: set[str] = set()  # variables that `start` added to the environment


def start(device_type: str, timeout_s: int) -> None:
    """Join the process group that the environment describes; without one, a group of this process alone.

    Collectives on CPU tensors go through gloo, those on CUDA tensors through nccl.

    Raises:
        DistributedError: the other ranks did not come within `timeout_s` seconds.
    """
    if dist.is_initialized():
        return
    if "RANK" not in os.environ:
        added = slurm_environment() if outer_ranks() else rank_environment(0, 1, free_port())
        _set_here.update(added.keys() - os.environ.keys())
        os.environ.update(added)
    # Imported later it would keep the group alive to the end of the process, where a thread of gloo's then may abort it.
    importlib.import_module("torch.distributed.nn.functional")
    backend = "gloo"
    if device_type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    except (dist.DistError, RuntimeError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        who = f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}"
        raise DistributedError(f"{who} could not meet the others at {where}: {error}") from error


def stop() -> None:
    """Leave the group, and the environment as it was: the next job of a sweep starts from there."""
    if dist.is_initialized():
        dist.destroy_process_group()
    for name in _set_here:
        os.environ.pop(name, None)
    _set_here.clear()


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


def is_main() -> bool:
    """Whether this process writes the run's files: rank 0."""
    return rank() == 0


def local_world_size() -> int:
    """Ranks on this machine."""
    return min(world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", world_size())))


def gather_objects(value: T) -> list[T]:
    """Every rank's value, in the order of the ranks; sizes may differ.

    Raises:
        DistributedError: another rank ended.
    """
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    with _together():
        dist.all_gather_object(values, value)
    return values


def from_main(action: Callable[[], T]) -> T:
    """What `action` returns on rank 0, on every rank; only rank 0 runs it.

    Raises:
        ClipExpError: rank 0's, on every rank.
        DistributedError: another rank ended.
    """
    if not dist.is_initialized():
        return action()
    answer: list[Any] = [None]
    if is_main():
        try:
            answer = [action()]
        except ClipExpError as error:
            answer = [error]
    with _together():
        dist.broadcast_object_list(answer, src=0)
    if isinstance(answer[0], ClipExpError):
        raise answer[0]
    return answer[0]


def share_from_main(tensors: Iterable[torch.Tensor]) -> None:
    """Give each tensor the values that it has on rank 0. All ranks call, with tensors of the same shapes in the same order.

    Raises:
        DistributedError: another rank ended.
    """
    if world_size() > 1:
        with _together():
            for tensor in tensors:
                dist.broadcast(tensor, src=0)


def main_first(action: Callable[[], T]) -> T:
    """What `action` returns on each rank; rank 0 runs it before the others, which find in a cache what it has fetched.

    Raises:
        ClipExpError: rank 0's, on every rank.
        DistributedError: another rank ended.
    """
    mine: list[T] = []
    from_main(lambda: mine.append(action()))
    return mine[0] if mine else action()


@contextmanager
def _together() -> Iterator[None]:
    """Around a collective, which fails where another rank has ended."""
    try:
        yield
    except RuntimeError as error:
        why = (
            "waited too long for another rank"
            if "imed out" in str(error)
            else "lost touch with another rank that ended"
        )
        raise DistributedError(f"rank {dist.get_rank()} of {dist.get_world_size()} {why}.") from error
