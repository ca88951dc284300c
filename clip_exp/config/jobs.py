"""Jobs of a sweep (`-m`)."""

import os
from contextlib import suppress
from typing import NamedTuple

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf


class Job(NamedTuple):
    """Job of a sweep.

    Attributes:
        sweep: folder of the sweep, named by its start time; the same for jobs in other processes.
        number: number of the job, from 0.
        overrides: overrides of the keys that the sweep varies.
    """

    sweep: str
    number: int
    overrides: list[str]


def current_job(arguments: list[str]) -> Job | None:
    """Return the current job of a sweep (`-m`); None outside a sweep.

    Args:
        arguments: arguments of the command line, with lists of values.
    """
    if not HydraConfig.initialized():
        return None
    config = HydraConfig.get()
    if config.mode != RunMode.MULTIRUN:
        return None
    varied = {*map(_varied, arguments), *(OmegaConf.select(config.sweeper, "params") or {})}
    overrides = [text for text in config.overrides.task if _key(text) in varied]
    return Job(os.path.abspath(config.sweep.dir), int(config.job.num), overrides)


def _varied(argument: str) -> str | None:
    """Return the key of an override with several values; None for other arguments."""
    with suppress(HydraException):
        if OverridesParser.create().parse_override(argument).is_sweep_override():
            return _key(argument)
    return None


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")
