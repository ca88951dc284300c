"""Checks across fields, before anything is loaded: every problem of a configuration is told at once.

The checks that need torch (devices) come last, and only where nothing else is wrong.
"""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clip_exp.config.schema import DataConfig, StrategyName, TrainConfig
from clip_exp.errors import ConfigError
from clip_exp.secrets import leaks

READ_TWICE_BYTES = 64 << 20
PRECISIONS = ("auto", "32-true", "bf16-mixed", "16-mixed")


def check_train(config: TrainConfig) -> None:
    """Refuse a run that cannot work.

    Raises:
        ConfigError: a line for every problem.
        DataError: the training table exists but cannot be read.
    """
    problems = [
        *_check_run(config),
        *_check_model(config),
        *_check_data(config.data),
        *_check_strategy(config),
        *_check_callbacks(config),
        *leaks(dataclasses.asdict(config)),
    ]
    if not problems:
        problems = [*_check_rows(config), *_check_devices(config)]
    if problems:
        raise ConfigError("\n".join(problems))


def requested_devices(config: TrainConfig) -> int | None:
    """Processes per node that `trainer.devices` names; None for `auto`."""
    devices = config.trainer.devices
    if isinstance(devices, list):
        return len(devices)
    return None if str(devices) == "auto" else int(devices)


def world_size(config: TrainConfig) -> int:
    """Processes of the run: those that an outer launcher started, or those that the configuration asks for."""
    launched = os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS")
    return int(launched) if launched else (requested_devices(config) or 1) * config.trainer.num_nodes


def _check_run(config: TrainConfig) -> Iterator[str]:
    positive: dict[str, Any] = {
        "global_batch_size": config.global_batch_size,
        "micro_batch_size": config.micro_batch_size,
        "max_steps": config.max_steps,
        "epochs": config.epochs,
        "log_every_n_steps": config.log_every_n_steps,
        "val_every_n_steps": config.val_every_n_steps,
        "checkpoint_every_n_steps": config.checkpoint_every_n_steps,
        "optimizer.lr": config.optimizer.lr,
        "trainer.num_nodes": config.trainer.num_nodes,
        "data.max_rows": config.data.max_rows,
        "patience": config.patience,
    }
    for key, value in positive.items():
        if value is not None and not 0 < value < float("inf"):
            yield f"{key}={value} must be above 0."
    if config.max_steps is not None and config.epochs is not None:
        yield f"max_steps={config.max_steps} and epochs={config.epochs:g} are both set: give one (epochs=null or max_steps=null)."
    if config.optimizer.weight_decay < 0:
        yield f"optimizer.weight_decay={config.optimizer.weight_decay} must not be negative."
    warmup = config.scheduler.warmup_steps
    if warmup is not None and warmup < 0:
        yield f"scheduler.warmup_steps={warmup} must not be negative."
    if warmup is not None and config.max_steps is not None and warmup > config.max_steps:
        yield _warmup_problem(warmup, config.max_steps)
    if config.precision not in PRECISIONS:
        yield f"precision={config.precision} must be one of {', '.join(PRECISIONS)}."
    if config.precision == "16-mixed" and config.trainer.accelerator == "cpu":
        yield "precision=16-mixed does not train on a CPU: use precision=auto."
    if not config.name or "/" in config.name or config.name.startswith("."):
        yield f"name={config.name!r} must be a plain folder name."


def _check_model(config: TrainConfig) -> Iterator[str]:
    model = config.model
    for tower, width, heads in (
        ("image", model.image.width, model.image.heads),
        ("text", model.text.width, model.text.heads),
    ):
        if heads <= 0 or width % heads:
            yield f"model.{tower}.width={width} must be a multiple of model.{tower}.heads={heads}."
    if model.image.image_size % model.image.patch_size:
        yield f"model.image.image_size={model.image.image_size} must be a multiple of model.image.patch_size={model.image.patch_size}."
    if not 0 <= model.dropout < 1:
        yield f"model.dropout={model.dropout} must be at least 0 and below 1."
    if config.pretrained is not None and not Path(config.pretrained).exists():
        yield f"pretrained={config.pretrained} does not exist: give a file of weights."


def _check_data(data: DataConfig) -> Iterator[str]:
    if data.generate is None and not data.train:
        yield "data.train has no value: give a table of image-text pairs (data.train=pairs.csv)."
    if data.generate is not None and (data.train or data.val):
        yield "data.generate and data.train exclude each other: use data=csv for your own tables."
    for key, tables in (("data.train", data.train), ("data.val", data.val)):
        for table in paths(tables):
            if "://" in table:
                yield f"{key} is an address: download it and give the file."
            elif not Path(table).is_file():
                yield f"{key}={table} does not exist (looked in {Path.cwd()})."
    if data.image_root is not None and not Path(data.image_root).is_dir():
        yield f"data.image_root={data.image_root} is not a folder."
    if data.num_workers is not None and data.num_workers < 0:
        yield f"data.num_workers={data.num_workers} must not be negative."
    if not 0 <= data.max_bad_fraction <= 1:
        yield f"data.max_bad_fraction={data.max_bad_fraction} must be a share between 0 and 1."
    for key, bounds in (("scale", data.augmentation.scale), ("ratio", data.augmentation.ratio)):
        if len(bounds) != 2 or not 0 < bounds[0] <= bounds[1]:
            yield f"data.augmentation.{key}={bounds} must be two positive numbers, the smaller first."
    if any("{}" not in template for template in data.templates):
        yield f"data.templates={data.templates}: every template needs a {{}} for the class name."


def paths(tables: Any) -> list[str]:
    """`data.train` or `data.val` as a list of paths."""
    if not tables:
        return []
    return [str(table) for table in tables] if isinstance(tables, list) else [str(tables)]


def _check_strategy(config: TrainConfig) -> Iterator[str]:
    trainer, strategy = config.trainer, config.strategy
    if trainer.accelerator not in ("auto", "cpu", "gpu"):
        yield f"trainer.accelerator={trainer.accelerator} must be auto, cpu or gpu."
    if trainer.accumulate_grad_batches != 1:
        yield (
            f"trainer.accumulate_grad_batches={trainer.accumulate_grad_batches}: a contrastive loss would not see more negatives. "
            "Raise global_batch_size and set micro_batch_size: the same memory, the gradient of the whole batch."
        )
    devices = trainer.devices
    if not (str(devices) == "auto" or isinstance(devices, list) or str(devices).isdigit()) or devices in (0, "0", []):
        yield f"trainer.devices={devices} must be auto, a number above 0, or a list of GPU indices."
        return
    ranks = world_size(config)
    if config.global_batch_size % ranks:
        yield f"global_batch_size={config.global_batch_size} must be a multiple of the {ranks} processes (trainer.devices times trainer.num_nodes)."
    if strategy.name == StrategyName.deepspeed:
        if strategy.stage not in (1, 2, 3):
            yield f"strategy.stage={strategy.stage} must be 1, 2 or 3."
        if strategy.offload and config.optimizer._target_ not in ("torch.optim.AdamW", "torch.optim.Adam"):
            yield f"strategy.offload steps with DeepSpeed's CPU Adam: use optimizer=adamw or adam instead of {config.optimizer._target_}."
        if config.callbacks.ema_decay is not None:
            yield "callbacks.ema_decay needs whole weights in every process: use strategy=auto or ddp."


def _check_callbacks(config: TrainConfig) -> Iterator[str]:
    if config.patience is not None and config.monitor is None:
        yield "patience needs a metric to watch: set monitor (monitor=val/loss)."
    if config.monitor is not None and config.data.generate is None and not config.data.val:
        yield f"monitor={config.monitor} needs validation data: set data.val."
    if config.monitor_mode not in ("auto", "min", "max"):
        yield f"monitor_mode={config.monitor_mode} must be auto, min or max."
    decay = config.callbacks.ema_decay
    if decay is not None and not 0 < decay < 1:
        yield f"callbacks.ema_decay={decay} must be between 0 and 1."
    if config.callbacks.progress not in ("auto", "bar", "lines", "none"):
        yield f"callbacks.progress={config.callbacks.progress} must be auto, bar, lines or none."
    wandb = config.logger.wandb
    if wandb is not None and wandb.mode not in ("online", "offline", "disabled"):
        yield f"logger.wandb.mode={wandb.mode} must be online, offline or disabled."


def _check_rows(config: TrainConfig) -> Iterator[str]:
    rows = _count_rows(config)
    if rows is None:
        return
    if rows < config.global_batch_size:
        yield f"global_batch_size={config.global_batch_size} is more than the {rows:,} training rows: lower it or add data."
    elif config.epochs is not None and config.scheduler.warmup_steps is not None:
        steps = steps_of(config, rows)
        if config.scheduler.warmup_steps > steps:
            yield _warmup_problem(config.scheduler.warmup_steps, steps)


def _count_rows(config: TrainConfig) -> int | None:
    """Rows of the training stream; None where the tables are too big to be read twice (the data module will count)."""
    from clip_exp.data.rows import build_rows
    from clip_exp.data.samples import count_rows
    from clip_exp.data.tables import read_table

    data = config.data
    if data.generate is not None:
        rows = count_rows(data.generate)
        return min(rows, data.max_rows or rows)
    tables = paths(data.train)
    if sum(Path(table).stat().st_size for table in tables) > READ_TWICE_BYTES:
        return None
    table = read_table(
        tables,
        image_key=data.image_key,
        caption_key=data.caption_key,
        image_root=data.image_root,
        separator=data.separator,
        encoding=data.encoding,
        on_bad_row=data.on_bad_row.value,
        max_rows=data.max_rows,
    )
    return len(build_rows(table, data.captions))


def steps_of(config: TrainConfig, rows: int) -> int:
    """Optimizer steps of the run: `max_steps`, or the whole batches that `epochs` passes over `rows` fill, at least one."""
    if config.max_steps is not None:
        return config.max_steps
    assert config.epochs is not None
    return max(1, int(config.epochs * rows) // config.global_batch_size)


def _warmup_problem(warmup: int, steps: int) -> str:
    return (
        f"scheduler.warmup_steps={warmup} is longer than the run of {steps} steps: the learning rate would never peak."
    )


def _check_devices(config: TrainConfig) -> Iterator[str]:
    wants_gpu = config.trainer.accelerator == "gpu" or isinstance(config.trainer.devices, list)
    if not wants_gpu or config.trainer.accelerator == "cpu":
        return
    import torch

    found = torch.cuda.device_count()
    asked = requested_devices(config)
    if found == 0:
        yield "trainer.accelerator=gpu, but torch finds no GPU: use trainer.accelerator=cpu, or install the driver and a CUDA build of torch."
    elif asked is not None and asked > found:
        yield f"trainer.devices={config.trainer.devices} asks for {asked} GPUs, and this machine has {found}."
