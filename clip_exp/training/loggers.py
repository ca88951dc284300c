"""Where metrics go: always `metrics.csv`, and the loggers that the configuration adds, without which a run can do."""

import json
import logging
import socket
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.loggers.logger import Logger

from clip_exp.config.load import plain
from clip_exp.config.schema import LoggerConfig, TrainConfig, WandbConfig
from clip_exp.config.targets import build_extra
from clip_exp.provenance import provenance
from clip_exp.secrets import redact
from clip_exp.training.identity import flatten
from clip_exp.training.metrics import MetricsCSV

log = logging.getLogger(__name__)
# What a run and Lightning call of a logger.
CALLED = ("log_metrics", "log_hyperparams", "log_graph", "save", "finalize")


def build_loggers(config: LoggerConfig, run_dir: Path, name: str) -> list[Logger]:
    """The run's loggers, `metrics.csv` first. A Weights & Biases server that does not answer does not stop the run.

    Raises:
        ConfigError: an `extra` logger is not allowed or refuses its arguments.
    """
    loggers: list[Logger] = [MetricsCSV(run_dir / "metrics.csv")]
    if config.tensorboard:
        loggers.append(TensorBoardLogger(run_dir, name="", version="tensorboard"))
    if config.wandb is not None and config.wandb.mode != "disabled":
        loggers.append(_wandb(config.wandb, run_dir, name))
    loggers += build_extra(config.extra, "logger.extra")
    return loggers


def start_loggers(loggers: list[Logger], config: TrainConfig) -> list[Logger]:
    """Give the loggers the configuration and the git state of a run, without secrets.

    A logger other than `metrics.csv` that fails, now or later, is reported once, and the run continues without it.

    Returns:
        Those that work so far.
    """
    csv, *others = loggers
    if not others:
        return [csv]
    about = provenance()
    values = _without_secrets({**plain(config), "clip_exp": about["clip_exp"], "git": about["git"]})
    return [csv, *(_expendable(logger) for logger in others if _starts(logger, values))]


def _starts(logger: Logger, values: dict[str, Any]) -> bool:
    """Give a logger the configuration, with which it opens its files or connection; return whether it could."""
    try:
        # TensorBoard shows a table with a column per key, and drops what is not a number or a text.
        logger.log_hyperparams(_as_table(values) if isinstance(logger, TensorBoardLogger) else values)
    except Exception as error:
        _leave_out(logger, logger.finalize, error)
        return False
    return True


def _expendable(logger: Logger) -> Logger:
    """Let the run continue without a logger that fails."""
    failed = False
    finalize = logger.finalize

    def guard(method: Callable[..., None]) -> Callable[..., None]:
        @wraps(method)
        def guarded(*arguments: Any, **named: Any) -> None:
            nonlocal failed
            if failed:
                return
            try:
                method(*arguments, **named)
            except Exception as error:
                failed = True
                _leave_out(logger, finalize, error)

        return guarded

    for name in CALLED:
        setattr(logger, name, guard(getattr(logger, name)))
    return logger


def _leave_out(logger: Logger, finalize: Callable[[str], None], error: Exception) -> None:
    """Report the failure of a logger, and close it, so that none of its threads keeps writing."""
    with suppress(Exception):
        finalize("failed")
    cause = error.__cause__ or error  # Lightning takes every failure of TensorBoard for a value that cannot be logged
    log.warning(
        "%s failed: %s. Training continues without it; metrics.csv has all metrics.", type(logger).__name__, cause
    )


def _as_table(values: dict[str, Any]) -> dict[str, str | float]:
    """Return values by dotted key, those that are not a number or a text as JSON."""
    return {
        key: value if isinstance(value, str | int | float) else json.dumps(value)
        for key, value in flatten(values).items()
    }


def _without_secrets(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_secrets(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_secrets(item) for item in value]
    return redact(value) if isinstance(value, str) else value


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
