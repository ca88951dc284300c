"""Lightning's Trainer for a run: device, precision, loggers and callbacks from the configuration."""

import logging
import math
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_only

from clip_exp.checkpoints.io import SafeCheckpointIO
from clip_exp.config.schema import StrategyName, TrainConfig
from clip_exp.config.targets import build_extra
from clip_exp.data.datamodule import PairsDataModule
from clip_exp.evaluation.prepared import Task
from clip_exp.precision import training_precision
from clip_exp.ranks import group
from clip_exp.ranks.group import is_main
from clip_exp.training.callbacks import AveragedWeights, Checkpointer, StopAtEnd, is_of_task, monitor_mode
from clip_exp.training.failures import ReportFailure, SameRanks
from clip_exp.training.loggers import build_loggers, start_loggers
from clip_exp.training.metrics import StepMetrics
from clip_exp.training.preemption import Preemption
from clip_exp.training.progress import build_progress
from clip_exp.training.strategies import GroupEnvironment, build_strategy
from clip_exp.training.tasks import TaskPatience, TaskScores


def build_trainer(
    config: TrainConfig,
    run_dir: Path,
    *,
    device: torch.device,
    steps: int,
    datamodule: PairsDataModule,
    preemption: Preemption,
    tasks: list[Task],
) -> pl.Trainer:
    """The Trainer of this rank.

    Args:
        device: of this rank.
        steps: of the run.
        datamodule: after its `setup`.
        preemption: ends the run when a signal asks for it.
        tasks: to score while training.
    """
    _quiet_lightning()
    # Lightning takes it from whatever variables a scheduler has left in the environment.
    rank_zero_only.rank = group.rank()  # type: ignore[attr-defined]
    io = SafeCheckpointIO()
    validate = datamodule.has_validation
    deepspeed = config.strategy.name == StrategyName.deepspeed
    callbacks = _build_callbacks(config, run_dir, io, steps, datamodule, tasks)
    trainer = pl.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        # One device per process, on a node of its own: see `GroupEnvironment`.
        devices=[device.index] if device.type == "cuda" else 1,
        num_nodes=group.world_size(),
        strategy=build_strategy(config.strategy, device),
        precision=training_precision(config.precision, device.type),  # type: ignore[arg-type]
        max_steps=steps,
        max_epochs=-1,
        min_epochs=0,
        val_check_interval=min(steps, config.val_every_n_steps or default_interval(steps)) if validate else None,
        check_val_every_n_epoch=None,
        limit_val_batches=1.0 if validate else 0,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        gradient_clip_val=config.trainer.gradient_clip_val if deepspeed else None,
        deterministic=config.trainer.deterministic,
        profiler=_profiler(config.trainer.profiler, run_dir),
        logger=start_loggers(build_loggers(config.logger, run_dir, config.name), config) if is_main() else False,
        callbacks=[*callbacks, preemption],
        plugins=[io, GroupEnvironment()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=run_dir,
    )
    preemption.take_over(trainer, next(c for c in callbacks if isinstance(c, Checkpointer)))
    return trainer


def default_interval(steps: int) -> int:
    """Steps between validations, and between checkpoints: ten in a run, and in short runs at least 50 steps apart."""
    return max(50, math.ceil(steps / 10))


def _build_callbacks(
    config: TrainConfig,
    run_dir: Path,
    io: SafeCheckpointIO,
    steps: int,
    datamodule: PairsDataModule,
    tasks: list[Task],
) -> list[pl.Callback]:
    """In the order in which they act at the end of a step: measure, show, average, score, stop, save."""
    metrics = StepMetrics(config.log_every_n_steps, config.global_batch_size, datamodule.num_rows)
    progress = build_progress(config.callbacks.progress, metrics)
    callbacks: list[pl.Callback] = [
        ReportFailure(config),
        SameRanks(),
        metrics,
        progress,
        StopAtEnd(),
    ]
    if config.callbacks.ema_decay is not None:
        callbacks.append(AveragedWeights(config.callbacks.ema_decay, config.callbacks.ema_every_n_steps))
    scores = TaskScores(tasks, config, run_dir, progress, metrics.pause) if tasks else None
    callbacks += [scores] if scores else []
    if config.patience is not None and config.monitor is not None:
        callbacks.append(_early_stopping(config.monitor, config.patience, config.monitor_mode, scores))
    callbacks += build_extra(config.callbacks.extra, "callbacks.extra")
    every = config.checkpoint_every_n_steps or default_interval(steps)
    metadata = {"samples_per_step": config.global_batch_size, "seed": config.seed}
    callbacks.append(
        Checkpointer(
            run_dir,
            io,
            every,
            config.monitor,
            config.monitor_mode,
            metadata,
            metrics.pause,
            scores,
            retry_s=config.callbacks.save_retry_s,
        )
    )
    return callbacks


def _early_stopping(monitor: str, patience: int, mode: str, scores: TaskScores | None) -> pl.Callback:
    mode = monitor_mode(monitor, mode)
    if scores is not None and is_of_task(monitor):
        return TaskPatience(scores, monitor, patience, mode)
    return pl.callbacks.EarlyStopping(monitor, patience=patience, mode=mode)


def _profiler(name: str | None, run_dir: Path) -> Any:
    if name is None:
        return None
    from pytorch_lightning import profilers

    kinds = {
        "simple": profilers.SimpleProfiler,
        "advanced": profilers.AdvancedProfiler,
        "pytorch": profilers.PyTorchProfiler,
    }
    return kinds[name](dirpath=run_dir, filename="profile")


def _quiet_lightning() -> None:
    """Lightning's hints are about its own data loading and logging, which a run does not use."""
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in (
        ".*does not have many workers.*",
        ".*GPU available but not used.*",
        ".*in eval mode at the start of training.*",  # frozen ones
        ".*`isinstance\\(treespec, LeafSpec\\)`.*",
    ):
        warnings.filterwarnings("ignore", message=message)
