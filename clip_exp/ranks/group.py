"""Process group of the ranks, and collective operations on objects. A single process needs no group."""

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
# Variables that MPI may leave in the environment; DeepSpeed would compare them with LOCAL_RANK.
LEFT_OVER = ("OMPI_COMM_WORLD_LOCAL_RANK",)
TIMED_OUT = "imed out"
TRANSPORT_ERRORS = (  # texts in errors of gloo, which are plain RuntimeErrors
    "gloo/transport", "Connection closed by peer", "Connection reset by peer", "Connection refused", "Broken pipe",
)  # fmt: skip
_placement: Placement | None = None  # placement of this process in the group that `start` joined
_environment: dict[str, str | None] = {}  # previous values of the environment variables that `start` changed


@contextmanager
def membership(device_type: str, timeout_s: int) -> Iterator[None]:
    """Join the process group inside the context; a nested context uses the same group.

    After a failure with other ranks, the group is not destroyed, because that would wait for collectives in which they may be stuck, and
    the error would never be shown. Such a process must end by `failure.end_process`.

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
    """Join the process group that the environment describes, or create a group of this process alone.

    Collectives on CPU tensors use gloo, those on CUDA tensors NCCL. On CUDA, the device of this process becomes the current one.

    Raises:
        DistributedError: the other ranks did not join within `timeout_s` seconds.
        ConfigError: a rank has no separate GPU; raised on all ranks.
    """
    global _placement
    if dist.is_initialized():
        return
    _placement = outer_placement() or local_placement(0, 1, free_port())
    # Other libraries read the environment: set the variables that describe this group, and remove left-over ones.
    values = {**dict.fromkeys(LEFT_OVER), **_placement.variables()}
    _environment.update({name: os.environ.get(name) for name in values})
    _set_environment(values)
    # If this module is first imported later, it keeps the group alive until the process ends, where a gloo thread may abort.
    importlib.import_module("torch.distributed.nn.functional")
    backend, gpu = "gloo", None
    if device_type == "cuda":
        backend, gpu = "cpu:gloo,cuda:nccl", _choose_gpu(_placement)
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    except (dist.DistError, RuntimeError) as error:
        who = f"rank {_placement.rank} of {_placement.world_size}"
        where = f"{_placement.main_address}:{_placement.main_port}"
        raise DistributedError(f"{who} could not connect to the other ranks at {where}: {error}") from error
    if gpu is not None and (problem := _gpu_problem(gather_objects(gpu))):
        raise ConfigError(problem)


def stop() -> None:
    """Leave the group and restore the environment, for the next job of a sweep. Waits for the other ranks."""
    global _placement
    if dist.is_initialized():
        dist.destroy_process_group()
    _placement = None
    _set_environment(_environment)
    _environment.clear()


class _GPU(NamedTuple):
    rank: int
    host: str
    visible: int  # number of GPUs that the rank can see
    local_world_size: int
    uuid: str | None  # None: no visible GPU can be assigned to the rank


def _choose_gpu(placement: Placement) -> _GPU:
    """Set this rank's current GPU: the one with the number of its local rank, or the only visible one."""
    visible = torch.cuda.device_count()
    index = placement.local_rank if visible > placement.local_rank else 0 if visible == 1 else None
    uuid = None
    if index is not None:
        torch.cuda.set_device(index)
        uuid = str(torch.cuda.get_device_properties(index).uuid)
    return _GPU(placement.rank, socket.gethostname(), visible, placement.local_world_size, uuid)


def _gpu_problem(gpus: list[_GPU]) -> str | None:
    """Return the problem with the GPUs of the ranks, or None; each rank must have a separate GPU."""
    owners: dict[tuple[str, str], int] = {}
    for gpu in gpus:
        if gpu.uuid is None:
            return f"{gpu.local_world_size} ranks were started on {gpu.host}, which has {gpu.visible} GPUs: start one rank per GPU."
        other = owners.setdefault((gpu.host, gpu.uuid), gpu.rank)
        if other != gpu.rank:
            return (
                f"ranks {other} and {gpu.rank} have the same GPU on {gpu.host}, where {gpu.local_world_size} ranks were started and a rank "
                f"sees {gpu.visible} GPUs: start one rank per GPU."
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
    """Return True on rank 0, which writes the files of a run."""
    return rank() == 0


def local_world_size() -> int:
    """Return the number of ranks on this machine."""
    return 1 if _placement is None else _placement.local_world_size


def device(device_type: str) -> torch.device:
    """Return the device of this process; on CUDA the current one, which `start` has set."""
    return torch.device(f"cuda:{torch.cuda.current_device()}" if device_type == "cuda" else device_type)


def lost_connection(error: BaseException) -> DistributedError | None:
    """Return the error to report if a collective failed because another rank ended or timed out; None for other errors."""
    if not isinstance(error, RuntimeError) or is_out_of_memory(error):
        return None
    text = str(error)
    if not isinstance(error, dist.DistError) and not any(known in text for known in (TIMED_OUT, *TRANSPORT_ERRORS)):
        return None
    why = (
        "timed out waiting for another rank"
        if TIMED_OUT in text
        else "lost the connection to another rank, which ended"
    )
    return DistributedError(f"rank {rank()} of {world_size()} {why}.")


def gather_objects(value: T) -> list[T]:
    """Return the values of all ranks in rank order; sizes may differ. Raise a DistributedError if another rank has ended."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    with _collective():
        dist.all_gather_object(values, value)
    return values


def from_main(action: Callable[[], T]) -> T:
    """Run `action` on rank 0, and return its result on all ranks.

    Raises:
        ClipExpError: the error of rank 0, on all ranks.
        DistributedError: another rank has ended.
    """
    if not dist.is_initialized():
        return action()
    answer: list[Any] = [None]
    if is_main():
        try:
            answer = [action()]
        except ClipExpError as error:
            answer = [error]
    with _collective():
        dist.broadcast_object_list(answer, src=0)
    if isinstance(answer[0], ClipExpError):
        raise answer[0]
    return answer[0]


def broadcast_from_main(tensors: Iterable[torch.Tensor]) -> None:
    """Copy the values of tensors from rank 0 to all ranks, in place. All ranks must pass tensors of the same shapes in the same order.

    Raises:
        DistributedError: another rank has ended.
    """
    if world_size() > 1:
        with _collective():
            for tensor in tensors:
                dist.broadcast(tensor, src=0)


def main_first(action: Callable[[], T]) -> T:
    """Run `action` on rank 0 first and then on the others, which find downloaded files in the cache; return each rank's own result.

    Raises:
        ClipExpError: the error of rank 0, on all ranks.
        DistributedError: another rank has ended.
    """
    mine: list[T] = []
    from_main(lambda: mine.append(action()))
    return mine[0] if mine else action()


@contextmanager
def _collective() -> Iterator[None]:
    """Translate errors of a collective that failed because another rank has ended."""
    try:
        yield
    except RuntimeError as error:
        if (lost := lost_connection(error)) is None:
            raise
        raise lost from error
