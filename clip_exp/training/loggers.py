"""Where metrics go: always `metrics.csv`, and the loggers that the configuration adds."""

import logging
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pytorch_lightning.loggers.logger import Logger

from clip_exp.config.schema import LoggerConfig, WandbConfig
from clip_exp.config.targets import build_extra
from clip_exp.training.metrics import MetricsCSV

log = logging.getLogger(__name__)


def build_loggers(config: LoggerConfig, run_dir: Path, name: str) -> list[Logger]:
    """The run's loggers, `metrics.csv` first. A Weights & Biases server that does not answer does not stop the run.

    Raises:
        ConfigError: an `extra` logger is not allowed or refuses its arguments.
    """
    loggers: list[Logger] = [MetricsCSV(run_dir / "metrics.csv")]
    if config.tensorboard:
        from pytorch_lightning.loggers import TensorBoardLogger

        loggers.append(TensorBoardLogger(run_dir, name="", version="tensorboard"))
    if config.wandb is not None and config.wandb.mode != "disabled":
        loggers.append(_wandb(config.wandb, run_dir, name))
    loggers += build_extra(config.extra, "logger.extra")
    return loggers


def _wandb(config: WandbConfig, run_dir: Path, name: str) -> Logger:
    """Weights & Biases under the run's folder; one id per folder, so that a continued run goes on in the same chart."""
    import wandb
    from pytorch_lightning.loggers import WandbLogger

    offline = config.mode == "offline"
    if not offline and not _reachable(config.init_timeout_s):
        log.warning(
            "Weights & Biases does not answer: logging offline. Later: wandb sync %s", run_dir / "wandb" / "latest-run"
        )
        offline = True
    mode = "offline" if offline else "online"
    settings = wandb.Settings(
        mode=mode, init_timeout=config.init_timeout_s, console="off", save_code=False, disable_git=True
    )
    options: dict[str, Any] = {
        "entity": config.entity,
        "group": config.group,
        "tags": config.tags,
        "settings": settings,
    }
    run_id = f"{name}-{run_dir.name}"
    return WandbLogger(
        name=run_id, id=run_id, save_dir=run_dir, project=config.project, offline=offline, resume="allow", **options
    )


def _reachable(timeout_s: float) -> bool:
    """Whether the configured server takes connections and there is a key for it."""
    import wandb

    try:
        settings = wandb.setup().settings
        address = urlsplit(settings.base_url)
        port = address.port or (443 if address.scheme == "https" else 80)
        with socket.create_connection((address.hostname or "", port), timeout=timeout_s):
            return bool(settings.api_key or wandb.api.api_key)
    except Exception:
        return False
