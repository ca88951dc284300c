"""Trainable parameters, learning rates and the optimizer: freezing, adapters, parameter groups, optimizer and schedule."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from clip_exp.config.model import ModelConfig
from clip_exp.config.registry import build, locate
from clip_exp.config.training import (
    FineTuneConfig,
    LossConfig,
    OptimizerConfig,
    SchedulerConfig,
    TowerTuningConfig,
)
from clip_exp.errors import ConfigError
from clip_exp.models.clip import CLIP
from clip_exp.models.depth import depths, projection_names
from clip_exp.training.lora import adapt, check_layers
from clip_exp.training.schedule import factor

TOWERS = ("image", "text")
# Names of position embeddings in the families of towers: clip_exp and open_clip, timm, Hugging Face.
POSITIONS = {
    "positional_embedding", "pos_embed", "position_embeddings", "position_embedding", "relative_position_bias_table",
}  # fmt: skip
KINDS = ("decay", "no_decay", "logit_scale")


# ------------------------------------------------------------------------------------------------------ what is trained


def prepare(model: CLIP, config: FineTuneConfig, architecture: ModelConfig) -> None:
    """Freeze parameters and insert adapters as configured. The logit scale and bias always learn.

    Args:
        model: model that already has its start weights.
        config: the fine-tuning configuration.
        architecture: configuration of the model.

    Raises:
        ConfigError: `unfrozen_blocks` exceeds the number of blocks, or there are no layers for adapters.
    """
    towers = {name: getattr(model, name) for name in TOWERS}
    if config.lora is None:
        for name, tower in towers.items():
            freeze(tower, getattr(config, name), f"finetune.{name}")
        return
    check_layers(towers, config.lora)
    side, length = architecture.image.image_size, architecture.text.context_length
    examples = {
        "image": torch.zeros(1, 3, side, side),
        "text": torch.full((1, length), 5),  # 5 is not a padding id in any library's tokenizer
    }
    for name, tower in towers.items():
        tower.requires_grad_(False)
        if getattr(config.lora, name):
            adapt(tower, config.lora, examples[name], name)


def freeze(tower: nn.Module, config: TowerTuningConfig, key: str) -> None:
    """Freeze a tower, except for its last `unfrozen_blocks` blocks and the layers after them.

    Args:
        tower: the tower.
        config: its part of the fine-tuning configuration.
        key: its configuration key, for messages.
    """
    if not config.freeze:
        return
    deep, blocks = depths(tower)
    frozen = blocks + 1 if config.unfrozen_blocks is None else blocks - config.unfrozen_blocks
    if frozen < 0:
        raise ConfigError(
            f"{key}.unfrozen_blocks={config.unfrozen_blocks} must be at most {blocks}, the number of blocks."
        )
    for name, parameter in tower.named_parameters():
        parameter.requires_grad_(deep[name] > frozen)


def frozen_modules(model: nn.Module, *, towers_frozen: bool) -> Iterator[nn.Module]:
    """Yield the modules that stay in evaluation mode during training: those that have weights, all of them frozen.

    Their batch normalization keeps its statistics, and their dropout is off.

    Args:
        model: the dual encoder.
        towers_frozen: yield both towers too, as only their projections learn at the moment (`finetune.freeze_towers_steps`).
    """
    if towers_frozen:
        yield from (getattr(model, name) for name in TOWERS)
    for module in model.modules():
        weights = list(module.parameters())
        if weights and not any(weight.requires_grad for weight in weights):
            yield module


# ------------------------------------------------------------------------------------------------------------- how fast


class Group(NamedTuple):
    """Settings that the parameters of an optimizer group share."""

    kind: str  # `decay` (matrices), `no_decay` (biases, norms, positions), `logit_scale`
    factor: float  # learning rate over the base rate
    delayed: bool  # the rate is 0 for the first `finetune.freeze_towers_steps`


def named_groups(model: nn.Module, finetune: FineTuneConfig) -> dict[Group, list[tuple[str, nn.Parameter]]]:
    """Return the trained parameters with their names, by group: matrices first, then the others, the logit scale last.

    The rate of a tower's parameter over the base rate is lr_factor * layer_decay ** (L + 1 - depth). In the first
    `freeze_towers_steps` only the projections of the towers learn. The logit scale is a separate group, because it is clamped after
    each step: ZeRO flattens each group and steps a float32 copy, so the copy must contain nothing else.
    """
    factors: dict[str, float] = {}
    delayed: set[str] = set()
    for tower in TOWERS:
        tuning: TowerTuningConfig = getattr(finetune, tower)
        if not tuning.lr_factor == tuning.layer_decay == 1:
            deep, blocks = depths(getattr(model, tower))
            for name, depth in deep.items():
                factors[f"{tower}.{name}"] = tuning.lr_factor * tuning.layer_decay ** (blocks + 1 - depth)
        if finetune.freeze_towers_steps:
            module: nn.Module = getattr(model, tower)
            body = {name for name, _ in module.named_parameters()} - projection_names(module)
            delayed |= {f"{tower}.{name}" for name in body}
    groups: dict[Group, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # Class tokens of timm have shape [1, 1, channels]: not matrices, in spite of their number of dimensions.
            token = parameter.ndim > 2 and parameter.numel() == max(parameter.shape)
            plain = parameter.ndim < 2 or token or POSITIONS & set(name.split("."))
            kind = "logit_scale" if name.endswith("logit_scale") else "no_decay" if plain else "decay"
            group = Group(kind, factors.get(name, 1.0), name in delayed)
            groups.setdefault(group, []).append((name, parameter))
    return dict(sorted(groups.items(), key=lambda item: KINDS.index(item[0].kind)))


# ----------------------------------------------------------------------------------------------- optimizer and schedule


def build_optimizer(
    model: nn.Module,
    config: OptimizerConfig,
    finetune: FineTuneConfig | None = None,
    *,
    logit_scale_range: tuple[float, float] = (0.0, math.log(100)),
    cpu_offload: bool = False,
    scaled_gradients: bool = False,
) -> Optimizer:
    """Build the configured optimizer, which clamps the logit scale after each step.

    Args:
        model: the dual encoder, after `prepare`.
        config: the optimizer configuration.
        finetune: the fine-tuning configuration, for learning rates per parameter; None: one rate for all.
        logit_scale_range: smallest and largest logit scale; see the function of that name.
        cpu_offload: whether the strategy keeps the optimizer state in host memory; Adam is then replaced by DeepSpeed's CPU Adam.
        scaled_gradients: whether gradients are scaled (float16). A fused step would unscale them after the norm was clipped, so it
            is disabled.

    Raises:
        ConfigError: the optimizer class is not allowed, or rejects an argument.
    """
    groups = [
        {
            "name": group.kind,
            "params": [parameter for _, parameter in members],
            "weight_decay": config.weight_decay if group.kind == "decay" else 0.0,
            **({"lr": config.lr * group.factor} if group.factor != 1 else {}),
        }
        for group, members in named_groups(model, finetune or FineTuneConfig()).items()
    ]
    target, arguments = config.target, config.arguments
    if "betas" in arguments:
        arguments["betas"] = tuple(arguments["betas"])
    if scaled_gradients and "fused" in arguments:
        arguments["fused"] = False
    if cpu_offload:
        arguments.pop("fused", None)
        arguments["adamw_mode"] = target.endswith("AdamW")
        target = "deepspeed.ops.adam.DeepSpeedCPUAdam"
    optimizer: Optimizer = build(target, "optimizer", groups, **arguments)

    @torch.no_grad()
    def clamp_logit_scale(optimizer: Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            if group.get("name") == "logit_scale":
                for parameter in group["params"]:
                    parameter.clamp_(*logit_scale_range)

    optimizer.register_step_post_hook(clamp_logit_scale)
    return optimizer


def logit_scale_range(loss: LossConfig, start: float) -> tuple[float, float]:
    """Return the smallest and the largest logit scale of a run that starts with `start`, as natural logarithms.

    The range contains `start`, unless `loss.max_logit_scale` is lower.
    """
    largest = max(loss.largest_logit_scale, start) if loss.max_logit_scale is None else loss.max_logit_scale
    return min(0.0, start, largest), largest


def build_scheduler(
    optimizer: Optimizer, config: SchedulerConfig, total_steps: int, starts: Sequence[int] | None = None
) -> LambdaLR:
    """Build the learning rate schedule, which is stepped once per optimizer step.

    Args:
        optimizer: the optimizer.
        config: the schedule configuration.
        total_steps: optimizer steps of the run.
        starts: step at which each group of the optimizer starts to learn; None: all at 0.

    Raises:
        ConfigError: `scheduler._target_` is not a function that maps the completed fraction of the decay to a factor.
    """
    decay = locate(config.target, "scheduler")
    try:
        float(decay(0.5, **config.kwargs))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"scheduler._target_={config.target} must be a function that maps the completed fraction of the decay (0 to 1) to a factor: {error}"
        ) from error
    schedules: list[Callable[[int], float]] = [
        partial(
            factor,
            start=start,
            warmup_steps=(total_steps - start) // 10 if config.warmup_steps is None else config.warmup_steps,
            total_steps=total_steps,
            decay=partial(decay, **config.kwargs),
            final_factor=config.final_factor,
        )
        for start in starts or [0] * len(optimizer.param_groups)
    ]
    return LambdaLR(optimizer, schedules)
