"""From an evaluation's configuration to its folder and the processes that work in it: none but this for one device."""

import logging
import sys
from pathlib import Path

from clip_exp.config.evaluation_schema import EvaluateConfig
from clip_exp.errors import PREEMPTED_EXIT_CODE, ClipExpError, ConfigError, DistributedError
from clip_exp.evaluation.evaluate import check, evaluate_in, open_folder
from clip_exp.evaluation.prepared import Task
from clip_exp.loading.source import ModelSource
from clip_exp.ranks.environment import outer_ranks
from clip_exp.ranks.launch import run_ranks
from clip_exp.ranks.signals import Stopped

TIMEOUT_S = 7200  # of a collective: a rank waits this long for the slowest


def launch(config: EvaluateConfig, arguments: list[str]) -> int:
    """Check everything, open the evaluation's folder and evaluate in it; return the exit code.

    Args:
        arguments: of the command line, for `run.json`.
    """
    if outer_ranks():
        return _join(config, arguments)
    source, tasks = check(config)
    ranks = _ranks(config)
    folder = open_folder(config, source, arguments)
    if ranks > 1 or isinstance(config.devices, list):
        return run_ranks("clip_exp.evaluation.worker", folder, ranks, config.devices)
    try:
        evaluate_in(folder, config, source, tasks)
    except Stopped as stopped:
        return tell_stopped(stopped, config)
    return 0


def tell_stopped(stopped: Stopped, config: EvaluateConfig) -> int:
    """Say how to go on; return the exit code."""
    how = (
        "goes on from the features that are kept" if config.cache_gb else "starts over, since cache_gb=0 keeps nothing"
    )
    print(f"{stopped} The same command {how}.", file=sys.stderr, flush=True)
    return PREEMPTED_EXIT_CODE


def _ranks(config: EvaluateConfig) -> int:
    """Processes that `devices` asks for.

    Raises:
        ConfigError: more GPUs than there are.
    """
    devices = config.devices
    asked = len(devices) if isinstance(devices, list) else int(devices) if str(devices).isdecimal() else None
    if config.accelerator == "cpu":
        return asked or 1
    import torch

    found = torch.cuda.device_count()
    if found and max(devices if isinstance(devices, list) else [(asked or 1) - 1]) >= found:
        raise ConfigError(f"devices={devices}: this machine has {found} GPUs, numbered from 0.")
    return asked or max(1, found)


def _join(config: EvaluateConfig, arguments: list[str]) -> int:
    """As one rank that torchrun or srun started: agree on the folder that rank 0 opens."""
    from clip_exp.loading.model import choose_device
    from clip_exp.ranks import group

    group.start(choose_device(config.accelerator).type, TIMEOUT_S)

    def open_new() -> Path:
        source, _ = check(config)
        return open_folder(config, source, arguments)

    try:
        folder = group.from_main(open_new)
        try:
            source, tasks = check_again(config, group.is_main())
            evaluate_in(folder, config, source, tasks)
        except DistributedError:
            raise
        except ClipExpError as error:
            raise type(error)(f"rank {group.rank()}: {error}") from error
    except Stopped as stopped:
        return tell_stopped(stopped, config) if group.is_main() else PREEMPTED_EXIT_CODE
    finally:
        group.stop()
    return 0


def check_again(config: EvaluateConfig, main: bool) -> tuple[ModelSource, list[Task]]:
    """`check` in a rank, whose warnings were told where it was first done; from here on only rank 0 warns."""
    root = logging.getLogger()
    root.setLevel(logging.ERROR)
    found = check(config)
    root.setLevel(logging.WARNING if main else logging.ERROR)
    return found
