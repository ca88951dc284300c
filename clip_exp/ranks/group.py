"""The processes that do a piece of work together: one group for whatever strategy follows. One process alone needs no group."""

import importlib
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from clip_exp.devices import is_out_of_memory
from clip_exp.errors import ClipExpError, ConfigError, DistributedError
from clip_exp.ranks.environment import Placement, free_port, local_placement, outer_placement

T = TypeVar("T")
# What other libraries of MPI's users leave in an environment, and DeepSpeed compares with LOCAL_RANK.
LEFT_OVER = ("OMPI_COMM_WORLD_LOCAL_RANK",)
TIMED_OUT = "imed out"
TRANSPORT_ERRORS = (  # of gloo, whose errors are plain RuntimeErrors
    "gloo/transport", "Connection closed by peer", "Connection reset by peer", "Connection refused", "Broken pipe",
)  # fmt: skip
_placement: Placement | None = None  # of this process in the group that `start` joined
_environment: dict[str, str | None] = {}  # what `start` changed, as it was before


@contextmanager
def membership(device_type: str, timeout_s: int) -> Iterator[None]:
    """Be a rank of the group inside; a membership inside another one is the same.

    After a failure the group is left alone where there are other ranks: destroying it waits for collectives in which they
    may be stuck, and nobody would hear why. Such a process ends by `failure.end_process`.

    Raises:
        DistributedError, ConfigError: see `start`.
    """
    if dist.is_initialized():
        yield
        return
    try:
        start(device_type, timeout_s)
        yield
    except BaseException:
        if world_size() == 1:
            stop()
        raise
    stop()


def start(device_type: str, timeout_s: int) -> None:
    """Join the process group that the environment describes; without one, a group of this process alone.

    Collectives on CPU tensors go through gloo, those on CUDA tensors through nccl. On CUDA this process's device is made the
    current one.

    Raises:
        DistributedError: the other ranks did not come within `timeout_s` seconds.
        ConfigError: a rank has no GPU of its own; the same on every rank.
    """
    global _placement
    if dist.is_initialized():
        return
    _placement = outer_placement() or local_placement(0, 1, free_port())
    # Libraries that read the environment find there what the group is, whatever was left over.
    values = {**dict.fromkeys(LEFT_OVER), **_placement.variables()}
    _environment.update({name: os.environ.get(name) for name in values})
    _set_environment(values)
    # Imported later it would keep the group alive to the end of the process, where a thread of gloo's then may abort it.
    importlib.import_module("torch.distributed.nn.functional")
    backend, gpu = "gloo", None
    if device_type == "cuda":
        backend, gpu = "cpu:gloo,cuda:nccl", _choose_gpu(_placement)
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    except (dist.DistError, RuntimeError) as error:
        who = f"rank {_placement.rank} of {_placement.world_size}"
        where = f"{_placement.main_address}:{_placement.main_port}"
        raise DistributedError(f"{who} could not meet the others at {where}: {error}") from error
    if gpu is not None and (problem := _gpu_problem(gather_objects(gpu))):
        raise ConfigError(problem)


def stop() -> None:
    """Leave the group, and the environment as it was: the next job of a sweep starts from there. Waits for the other ranks."""
    global _placement
    if dist.is_initialized():
        dist.destroy_process_group()
    _placement = None
    _set_environment(_environment)
    _environment.clear()


class _GPU(NamedTuple):
    rank: int
    host: str
    visible: int  # GPUs that the rank sees
    local_world_size: int
    uuid: str | None  # None: the rank sees none that could be its own


def _choose_gpu(placement: Placement) -> _GPU:
    """Make this rank's GPU the current one: that of its local rank, or the only one that the launcher lets it see."""
    visible = torch.cuda.device_count()
    index = placement.local_rank if visible > placement.local_rank else 0 if visible == 1 else None
    uuid = None
    if index is not None:
        torch.cuda.set_device(index)
        uuid = str(torch.cuda.get_device_properties(index).uuid)
    return _GPU(placement.rank, socket.gethostname(), visible, placement.local_world_size, uuid)


def _gpu_problem(gpus: list[_GPU]) -> str | None:
    """Return what is wrong with the GPUs of all the ranks, if anything: each must have one of its own."""
    owners: dict[tuple[str, str], int] = {}
    for gpu in gpus:
        if gpu.uuid is None:
            return f"{gpu.local_world_size} ranks were started on {gpu.host}, which has {gpu.visible} GPUs: start one rank per GPU."
        other = owners.setdefault((gpu.host, gpu.uuid), gpu.rank)
        if other != gpu.rank:
            return (
                f"ranks {other} and {gpu.rank} have the same GPU of {gpu.host}, of {gpu.visible} that a rank sees there, for "
                f"{gpu.local_world_size} ranks: start one rank per GPU."
            )
    return None


def _set_environment(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


def is_main() -> bool:
    """Whether this process writes the run's files: rank 0."""
    return rank() == 0


def local_world_size() -> int:
    """Return the number of ranks on this machine."""
    return 1 if _placement is None else _placement.local_world_size


def device(device_type: str) -> torch.device:
    """Return this process's device: on CUDA the current one, which `start` has chosen."""
    return torch.device(f"cuda:{torch.cuda.current_device()}" if device_type == "cuda" else device_type)


def lost_touch(error: BaseException) -> DistributedError | None:
    """Return what to report of a collective that failed because another rank has ended, or did not come in time; None for others."""
    if not isinstance(error, RuntimeError) or is_out_of_memory(error):
        return None
    text = str(error)
    if not isinstance(error, dist.DistError) and not any(known in text for known in (TIMED_OUT, *TRANSPORT_ERRORS)):
        return None
    why = "waited too long for another rank" if TIMED_OUT in text else "lost touch with another rank that ended"
    return DistributedError(f"rank {rank()} of {world_size()} {why}.")


def gather_objects(value: T) -> list[T]:
    """Return every rank's value, in the order of the ranks; sizes may differ. Raise a DistributedError where a rank has ended."""
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
        if (lost := lost_touch(error)) is None:
            raise
        raise lost from error
