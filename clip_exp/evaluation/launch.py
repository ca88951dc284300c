"""From an evaluation's configuration to its folder and the processes that work in it: none but this for one device."""

import sys
from pathlib import Path

from clip_exp.config.evaluation_schema import EvaluateConfig
from clip_exp.errors import PREEMPTED_EXIT_CODE, ConfigError
from clip_exp.evaluation.run import check, evaluate_in, open_folder
from clip_exp.ranks.environment import outer_ranks
from clip_exp.ranks.launch import run_ranks
from clip_exp.ranks.signals import Stopped

TIMEOUT_S = 7200  # of a collective: a rank waits this long for the slowest


def launch(config: EvaluateConfig, arguments: list[str]) -> int:
    """Check everything, open the evaluation's folder and evaluate in it; return the exit code.

    Args:
        arguments: of the command line, for `run.json`.
    """
    ranks = _ranks(config)
    if outer_ranks():
        return _join(config, arguments)
    source, tasks = check(config)
    folder = open_folder(config, source, arguments)
    if ranks > 1 or isinstance(config.devices, list):
        return run_ranks("clip_exp.evaluation.worker", folder, ranks, config.devices)
    try:
        evaluate_in(folder, config, source, tasks)
    except Stopped as stopped:
        return tell_stopped(stopped)
    return 0


def tell_stopped(stopped: Stopped) -> int:
    """Say how to go on; return the exit code."""
    print(f"{stopped} The same command goes on from the features that are kept.", file=sys.stderr, flush=True)
    return PREEMPTED_EXIT_CODE


def _ranks(config: EvaluateConfig) -> int:
    """Processes that `devices` asks for."""
    devices = config.devices
    if isinstance(devices, list) and devices and all(isinstance(index, int) and index >= 0 for index in devices):
        return len(devices)
    if str(devices).isdecimal() and int(devices) > 0:
        return int(devices)
    if str(devices) not in ("auto", "-1"):
        raise ConfigError(f"devices={devices} must be auto, a number above 0, or a list of GPU indices.")
    if config.accelerator == "cpu":
        return 1
    import torch

    return max(1, torch.cuda.device_count())


def _join(config: EvaluateConfig, arguments: list[str]) -> int:
    """As one rank that torchrun or srun started: agree on the folder that rank 0 opens."""
    from clip_exp.inference.loading import choose_device
    from clip_exp.ranks import group

    group.start(choose_device(config.accelerator).type, TIMEOUT_S)

    def open_new() -> Path:
        source, _ = check(config)
        return open_folder(config, source, arguments)

    try:
        folder = group.from_main(open_new)
        source, tasks = check(config)
        evaluate_in(folder, config, source, tasks)
    except Stopped as stopped:
        return tell_stopped(stopped)
    finally:
        group.stop()
    return 0
