"""Which job of a sweep this is."""

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode


def job_number() -> int | None:
    """The number of the job inside `-m`, from 0; None outside a sweep."""
    if not HydraConfig.initialized():
        return None
    config = HydraConfig.get()
    return int(config.job.num) if config.mode == RunMode.MULTIRUN else None
