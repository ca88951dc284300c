"""Which job of a sweep this is."""

import os
from contextlib import suppress
from typing import NamedTuple

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf


class Job(NamedTuple):
    """A job of a sweep."""

    sweep: str  # the sweep's folder, whose name has the time at which it began: jobs in other processes have the same
    number: int  # from 0
    overrides: list[str]  # of the keys that the sweep varies


def current_job(arguments: list[str]) -> Job | None:
    """Return the job of `-m` that this is; None outside a sweep.

    Args:
        arguments: of the command line, with lists of values.
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
    """Return the key of an override that gives several values."""
    with suppress(HydraException):
        if OverridesParser.create().parse_override(argument).is_sweep_override():
            return _key(argument)
    return None


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")
