"""Checks across fields, before anything is loaded: every problem of a configuration is told at once.

The checks that need torch (devices) and the tables come last, and only where nothing else is wrong.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator

from clip_exp.config.idle import idle_problems, typed_keys
from clip_exp.config.model_rules import check_model, check_trim, check_vocabulary
from clip_exp.config.ranges import INFINITY, TINY, range_problems
from clip_exp.config.schema import StrategyName, TrainConfig
from clip_exp.data.preflight import RunTables, check_data, check_tables
from clip_exp.devices import Devices, parse_devices
from clip_exp.errors import ConfigError, gravest
from clip_exp.ranks.environment import device_problems, outer_placement
from clip_exp.runs import name_problems
from clip_exp.secrets import leaks
from clip_exp.training.measures import check_measures
from clip_exp.training.preflight_finetune import check_finetune, probe_problems
from clip_exp.weights.find import check_pretrained

PRECISIONS = ("auto", "32-true", "bf16-mixed", "16-mixed")
MAX_LOGARITHM = 10  # of a logit scale: a factor of 22,000


def check_train(config: TrainConfig, arguments: Iterable[str] = ()) -> RunTables:
    """Refuse a run that cannot work; return its tables.

    Args:
        arguments: of the command line, whose keys must have an effect.

    Raises:
        ClipExpError: of the class of the gravest problem, with a line for every problem.
        DataError: a table cannot be read, or none of its pictures can.
    """
    typed = typed_keys(arguments)
    problems = [
        *_check_run(config),
        *check_model(config.model),
        *check_trim(config.model),
        *check_vocabulary(config.model.text),
        *(check_pretrained(config.pretrained, config.model) if config.pretrained is not None else ()),
        *check_data(config.data),
        *_check_strategy(config),
        *_check_callbacks(config),
        *check_finetune(config),
        *idle_problems(config, typed),
        *leaks(dataclasses.asdict(config)),
    ]
    errors = [*map(ConfigError, problems), *check_measures(config, typed)]
    errors = errors or [*map(ConfigError, _check_devices(config))]
    if errors:
        raise gravest(errors)
    # Tables come last: reading a big one takes minutes, and leaves its index.
    tables = check_tables(config)
    if problems := list(_check_rows(config, tables.rows)):
        raise ConfigError("\n".join(problems))
    return tables


def requested_devices(config: TrainConfig) -> Devices:
    """Return the devices of a node that the configuration requests.

    Raises:
        ConfigError: see `parse_devices`.
    """
    return parse_devices(config.trainer.accelerator, config.trainer.devices, "trainer.")


def _ranks(config: TrainConfig) -> int | None:
    """Return the processes of the run: those of the launcher, or those that the configuration requests; None: GPUs decide."""
    placement = outer_placement()
    if placement is not None:
        return placement.world_size
    devices = requested_devices(config)
    here = 1 if devices.accelerator == "cpu" and devices.requested is None else devices.requested
    return None if here is None else here * (config.trainer.num_nodes or 1)


def _check_run(config: TrainConfig) -> Iterator[str]:
    yield from _check_numbers(config)
    if config.max_steps is not None and config.epochs is not None:
        yield f"max_steps={config.max_steps} and epochs={config.epochs:g} are both set: give one (epochs=null or max_steps=null)."
    warmup = config.scheduler.warmup_steps
    if warmup is not None and config.max_steps is not None and warmup > config.max_steps:
        yield _warmup_problem(warmup, config.max_steps)
    if config.precision not in PRECISIONS:
        yield f"precision={config.precision} must be one of {', '.join(PRECISIONS)}."
    if config.precision == "16-mixed" and config.trainer.accelerator == "cpu":
        yield "precision=16-mixed does not train on a CPU: use precision=auto."
    yield from name_problems(config.name)


def _check_numbers(config: TrainConfig) -> Iterator[str]:
    start = config.loss.init_logit_scale if config.pretrained is None else None  # weights have their own
    ranges = {
        "seed": (config.seed, 0, 2**32 - 1),
        "max_steps": (config.max_steps, 1, INFINITY),
        "epochs": (config.epochs, TINY, 1e9),
        "global_batch_size": (config.global_batch_size, 1, INFINITY),
        "micro_batch_size": (config.micro_batch_size, 1, INFINITY),
        "log_every_n_steps": (config.log_every_n_steps, 1, INFINITY),
        "val_every_n_steps": (config.val_every_n_steps, 1, INFINITY),
        "checkpoint_every_n_steps": (config.checkpoint_every_n_steps, 1, INFINITY),
        "task_every_n_steps": (config.task_every_n_steps, 1, INFINITY),
        "patience": (config.patience, 1, INFINITY),
        "optimizer.lr": (config.optimizer.lr, TINY, 1e9),
        "optimizer.weight_decay": (config.optimizer.weight_decay, 0, 1e9),
        "scheduler.warmup_steps": (config.scheduler.warmup_steps, 0, INFINITY),
        "scheduler.final_factor": (config.scheduler.final_factor, 0, 1e9),
        "strategy.timeout_s": (config.strategy.timeout_s, 1, 10**7),
        "trainer.num_nodes": (config.trainer.num_nodes, 1, INFINITY),
        "trainer.gradient_clip_val": (config.trainer.gradient_clip_val, TINY, 1e30),
        "loss.init_logit_scale": (start, 0, math.ceil(min(config.loss.largest_logit_scale, MAX_LOGARITHM) * 1e4) / 1e4),
        "loss.init_logit_bias": (config.loss.init_logit_bias, -1e3, 1e3),
        "loss.chunk_size": (config.loss.chunk_size, 1, INFINITY),
        "callbacks.ema_decay": (config.callbacks.ema_decay, TINY, 1 - 1e-12),
        "callbacks.ema_every_n_steps": (config.callbacks.ema_every_n_steps, 1, INFINITY),
        "callbacks.save_retry_s": (config.callbacks.save_retry_s, 0, INFINITY),
    }
    yield from range_problems(ranges)
    largest = config.loss.max_logit_scale
    if largest is not None and not 0 <= largest <= MAX_LOGARITHM:
        yield f"loss.max_logit_scale={largest:g} must be between 0 and {MAX_LOGARITHM}: it is a natural logarithm, that of 100 is 4.6052."
    betas = getattr(config.optimizer, "betas", [0.9, 0.99])
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        yield f"optimizer.betas={betas} must be two numbers from 0 to below 1."


def _check_strategy(config: TrainConfig) -> Iterator[str]:
    strategy = config.strategy
    try:
        requested_devices(config)
    except ConfigError as error:
        yield str(error)
    else:
        yield from _check_batch(config, _ranks(config) or 1)
    if strategy.name == StrategyName.deepspeed:
        if strategy.stage not in (1, 2, 3):
            yield f"strategy.stage={strategy.stage} must be 1, 2 or 3."
        if strategy.offload and config.optimizer._target_ not in ("torch.optim.AdamW", "torch.optim.Adam"):
            yield f"strategy.offload steps with DeepSpeed's CPU Adam: use optimizer=adamw or adam instead of {config.optimizer._target_}."
        if config.callbacks.ema_decay is not None:
            yield "callbacks.ema_decay needs whole weights in every process: use strategy=auto or ddp."


def _check_batch(config: TrainConfig, ranks: int) -> Iterator[str]:
    if config.global_batch_size % ranks:
        yield (
            f"global_batch_size={config.global_batch_size} must be a multiple of the {ranks} processes "
            "(trainer.devices times trainer.num_nodes)."
        )


def _check_callbacks(config: TrainConfig) -> Iterator[str]:
    if config.trainer.profiler not in (None, "simple", "advanced", "pytorch"):
        yield f"trainer.profiler={config.trainer.profiler} must be null, simple, advanced or pytorch."
    if config.callbacks.progress not in ("auto", "bar", "lines", "none"):
        yield f"callbacks.progress={config.callbacks.progress} must be auto, bar, lines or none."
    wandb = config.logger.wandb
    if wandb is not None and wandb.mode not in ("online", "offline", "disabled"):
        yield f"logger.wandb.mode={wandb.mode} must be online, offline or disabled."


def _check_rows(config: TrainConfig, rows: int) -> Iterator[str]:
    if rows < config.global_batch_size:
        yield f"global_batch_size={config.global_batch_size} is more than the {rows:,} training rows: lower it or add data."
    elif config.epochs is not None:
        steps = steps_of(config, rows)
        if (config.scheduler.warmup_steps or 0) > steps:
            yield _warmup_problem(config.scheduler.warmup_steps, steps)
        else:
            yield from probe_problems(config, steps)


def steps_of(config: TrainConfig, rows: int) -> int:
    """Optimizer steps of the run: `max_steps`, or the whole batches that `epochs` passes over `rows` fill, at least one."""
    if config.max_steps is not None:
        return config.max_steps
    assert config.epochs is not None
    return max(1, int(config.epochs * rows) // config.global_batch_size)


def _warmup_problem(warmup: int | None, steps: int) -> str:
    return (
        f"scheduler.warmup_steps={warmup} is longer than the run of {steps} steps: the learning rate would never peak."
    )


def _check_devices(config: TrainConfig) -> Iterator[str]:
    devices = requested_devices(config)
    problems = list(device_problems(devices, config.trainer.num_nodes, "trainer."))
    yield from problems
    if not problems and _ranks(config) is None:
        yield from _check_batch(config, devices.count() * (config.trainer.num_nodes or 1))
