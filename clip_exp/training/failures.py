"""Failures of a training step in words that a user can act on, reported before Lightning tidies up."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch

from clip_exp.config.schema import StrategyName, TrainConfig
from clip_exp.data.loader import explain_worker_failure
from clip_exp.devices import is_out_of_memory
from clip_exp.errors import DeviceMemoryError, DistributedError
from clip_exp.ranks import failure, group
from clip_exp.training.preemption import Preempted


class ReportFailure(pl.Callback):
    """Reports the failure of a rank as soon as Lightning sees it.

    What Lightning does next may block forever: it moves the model to the CPU, behind whatever the GPU waits for.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        if not isinstance(exception, Preempted):
            failure.report(explain(exception, trainer, self.config))


class SameRanks(pl.Callback):
    """Checks before the first step that the group, Lightning and DeepSpeed agree on rank, number of ranks and device."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        device = trainer.strategy.root_device
        expected = (group.rank(), group.world_size(), str(group.device(device.type)))
        found = {"Lightning": (trainer.global_rank, trainer.world_size, str(trainer.strategy.root_device))}
        engine = getattr(trainer.strategy, "deepspeed_engine", None)
        if engine is not None:
            found["DeepSpeed"] = (engine.global_rank, engine.world_size, str(engine.device))
        check_same_ranks(expected, found)


def check_same_ranks(expected: tuple[int, int, str], found: dict[str, tuple[int, int, str]]) -> None:
    """Check what libraries take for rank, number of ranks and device of this process.

    Raises:
        DistributedError: one of them differs from the process group's.
    """
    rank, ranks, device = expected
    for library, values in found.items():
        if values != expected:
            other_rank, other_ranks, other_device = values
            raise DistributedError(
                f"rank {rank} of {ranks} on {device} is rank {other_rank} of {other_ranks} on {other_device} for {library}: "
                "training would be wrong. Please report this with the environment variables of your launcher."
            )


def explain(error: BaseException, trainer: pl.Trainer, config: TrainConfig) -> BaseException:
    """Return what to report of an error in training: one of ours where the cause is known, else the error."""
    worker_failure = explain_worker_failure(error, "data.num_workers")
    if worker_failure is not None:
        return worker_failure
    if is_out_of_memory(error):
        return DeviceMemoryError(_out_of_memory(error, trainer, config))
    return group.lost_touch(error) if group.is_transport_error(error) else error


@contextmanager
def explained_failures(trainer: pl.Trainer, config: TrainConfig) -> Iterator[None]:
    """Around training: raise what `explain` returns."""
    try:
        yield
    except Exception as error:
        explained = explain(error, trainer, config)
        if explained is error:
            raise
        raise explained from error


def _out_of_memory(error: BaseException, trainer: pl.Trainer, config: TrainConfig) -> str:
    device = trainer.strategy.root_device
    per_rank = config.global_batch_size // group.world_size()
    micro = min(config.micro_batch_size or per_rank, per_rank)
    peak = (
        f" after a peak of {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB" if device.type == "cuda" else ""
    )
    remedies = []
    if micro > 1:
        remedies.append(f"set micro_batch_size={max(1, micro // 2)} (now {micro}), which gives the same gradients")
    if config.strategy.name != StrategyName.deepspeed and group.world_size() > 1:
        remedies.append("split the optimizer's state over the ranks with strategy=deepspeed_stage_2 or 3")
    elif config.strategy.name == StrategyName.deepspeed and not config.strategy.offload:
        remedies.append(
            "keep the optimizer's state in host memory with strategy=deepspeed_stage_2_offload or 3_offload"
        )
    remedies.append(f"lower global_batch_size={config.global_batch_size}")
    first = str(error).strip().splitlines() or [type(error).__name__]
    return (
        f"out of memory on {device} in step {trainer.global_step + 1}, rank {group.rank()} of {group.world_size()}{peak}: "
        f"{'; or '.join(remedies)}.\n  {first[0]}"
    )
