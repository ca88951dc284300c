"""From a training configuration to the folder of its run and the processes that train in it: none but this for one device."""

import contextlib
from pathlib import Path

from clip_exp.config.schema import TrainConfig
from clip_exp.errors import ClipExpError, ConfigError
from clip_exp.ranks.environment import outer_ranks
from clip_exp.ranks.launch import run_ranks
from clip_exp.runs import lock
from clip_exp.training.opening import open_run
from clip_exp.training.preflight import requested_devices


def launch(config: TrainConfig, arguments: list[str], job: int | None) -> int:
    """Open the run's folder and train in it; return the exit code.

    Args:
        arguments: of the command line, for `run.json`.
        job: number of the job in a sweep, or None.
    """
    if outer_ranks():
        if job is not None:
            raise ConfigError(
                "a sweep (-m) starts its own processes: run it without torchrun or srun, with trainer.devices."
            )
        return _join(config, arguments)
    return train_here(config, arguments, "" if job is None else f"-{job}")[1]


def train_here(config: TrainConfig, arguments: list[str], suffix: str = "") -> tuple[Path, int]:
    """Train in this process, or in those that it starts; the run's folder and the exit code.

    Args:
        suffix: of the name of a new folder.
    """
    opening = open_run(config, suffix)
    run_dir = opening.folder
    if opening.finished:
        return run_dir, _already(run_dir)
    with lock(run_dir):
        opening.begin(arguments)
        ranks = _ranks(config)
        print(f"run folder: {run_dir}", flush=True)
        if ranks > 1 or isinstance(config.trainer.devices, list):
            return run_dir, run_ranks("clip_exp.training.worker", run_dir, ranks, config.trainer.devices)
        from clip_exp.training.worker import work

        return run_dir, work(run_dir)


def _already(run_dir: Path) -> int:
    print(f"{run_dir} has finished this run already; resume=never starts another.")
    return 0


def _ranks(config: TrainConfig) -> int:
    asked = requested_devices(config)
    if config.trainer.num_nodes > 1:
        raise ConfigError(
            f"trainer.num_nodes={config.trainer.num_nodes}: start the command on every node, for example "
            f"torchrun --nnodes={config.trainer.num_nodes} --nproc-per-node={asked or 'gpu'} --rdzv-endpoint=<first node>:29500 train.py …"
        )
    if asked is not None:
        return asked
    if config.trainer.accelerator == "cpu":
        return 1
    import torch

    return max(1, torch.cuda.device_count())


def _join(config: TrainConfig, arguments: list[str]) -> int:
    """As one rank that torchrun or srun started: agree on the folder that rank 0 opens."""
    import torch.distributed as dist

    from clip_exp.ranks import group
    from clip_exp.training.trainer import resolve_device
    from clip_exp.training.worker import work

    group.start(resolve_device(config), config.strategy.timeout_s)
    this_rank = dist.get_rank()
    with contextlib.ExitStack() as held:

        def open_folder() -> tuple[Path, bool]:
            opening = open_run(config)
            if not opening.finished:
                held.enter_context(lock(opening.folder))
                opening.begin(arguments)
            return opening.folder, opening.finished

        run_dir, finished = group.from_main(open_folder)
        if finished:
            return _already(run_dir) if group.is_main() else 0
        try:
            return work(run_dir)
        except ClipExpError as error:
            raise type(error)(f"rank {this_rank}: {error}") from error
