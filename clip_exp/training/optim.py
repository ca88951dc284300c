"""Optimizer and schedule of a dual encoder, from the configuration."""

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from clip_exp.config.schema import FineTuneConfig, LossConfig, OptimizerConfig, SchedulerConfig
from clip_exp.config.targets import build, locate
from clip_exp.errors import ConfigError
from clip_exp.training.finetune import factors, late_names
from clip_exp.training.schedule import factor

# What the families call their embeddings of positions: ours and open_clip's, timm's, Hugging Face's.
POSITIONS = {
    "positional_embedding",
    "pos_embed",
    "position_embeddings",
    "position_embedding",
    "relative_position_bias_table",
}
KINDS = ("decay", "no_decay", "logit_scale")


class Group(NamedTuple):
    """Parameters that are treated alike."""

    kind: str  # `decay` (matrices), `no_decay` (biases, norms, positions), `logit_scale`
    factor: float  # of the learning rate
    late: bool  # whether they start to learn after the linear probe


def named_groups(model: nn.Module, finetune: FineTuneConfig) -> dict[Group, list[tuple[str, nn.Parameter]]]:
    """Trained parameters by treatment, with their names; first all matrices, then the others, last the logit scale.

    The logit scale has a group of its own, so that it can be clamped where a strategy flattens each group's parameters.
    """
    factor_of = factors(model, finetune)
    late = late_names(model) if finetune.linear_probe_steps else set()
    groups: dict[Group, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = Group(_kind(name, parameter), factor_of.get(name, 1.0), name in late)
            groups.setdefault(group, []).append((name, parameter))
    return dict(sorted(groups.items(), key=lambda item: KINDS.index(item[0].kind)))


def _kind(name: str, parameter: nn.Parameter) -> str:
    if name.endswith("logit_scale"):
        return "logit_scale"
    # A class token of timm has two axes of length 1 before its channels.
    token = parameter.ndim > 2 and parameter.numel() == max(parameter.shape)
    return "no_decay" if parameter.ndim < 2 or token or POSITIONS & set(name.split(".")) else "decay"


def logit_scale_range(loss: LossConfig, start: float) -> tuple[float, float]:
    """Return the least and the largest logit scale of a run, as natural logarithms.

    What the run starts with is never outside, unless the configuration says so.

    Args:
        start: the logit scale that the run starts with.
    """
    largest = max(loss.largest_logit_scale, start) if loss.max_logit_scale is None else loss.max_logit_scale
    return min(0.0, start, largest), largest


def build_optimizer(
    model: nn.Module,
    config: OptimizerConfig,
    finetune: FineTuneConfig | None = None,
    *,
    logit_scale_range: tuple[float, float] = (0.0, math.log(100)),
    cpu_offload: bool = False,
    scaled_gradients: bool = False,
) -> Optimizer:
    """The configured optimizer, clamping the logit scale after each of its steps.

    Args:
        finetune: which parameters have other rates; None: none.
        logit_scale_range: see the function of that name.
        cpu_offload: the strategy keeps the optimizer's state in host memory: Adam becomes DeepSpeed's CPU Adam.
        scaled_gradients: float16 training: a fused step would unscale the gradient itself, too late for clipping its norm.

    Raises:
        ConfigError: the class is not allowed, or refuses an argument.
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
    target, arguments = config._target_, _arguments(config)
    if scaled_gradients and "fused" in arguments:
        arguments["fused"] = False
    if cpu_offload:
        arguments.pop("fused", None)
        arguments["adamw_mode"] = target.endswith("AdamW")
        target = "deepspeed.ops.adam.DeepSpeedCPUAdam"
    optimizer: Optimizer = build(target, "optimizer", groups, **arguments)
    optimizer.register_step_post_hook(partial(_clamp_logit_scale, logit_scale_range))
    return optimizer


def _arguments(config: OptimizerConfig) -> dict[str, Any]:
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    values.update(values.pop("kwargs", {}))
    values.pop("_target_")
    if "betas" in values:
        values["betas"] = tuple(values["betas"])
    return values


def _clamp_logit_scale(limits: tuple[float, float], optimizer: Optimizer, *_: Any) -> None:
    with torch.no_grad():
        for group in optimizer.param_groups:
            if group.get("name") == "logit_scale":
                for parameter in group["params"]:
                    parameter.clamp_(*limits)


def warmup_steps(config: SchedulerConfig, total_steps: int) -> int:
    """The configured warm-up, or a tenth of the run."""
    return total_steps // 10 if config.warmup_steps is None else config.warmup_steps


def build_scheduler(
    optimizer: Optimizer, config: SchedulerConfig, total_steps: int, starts: Sequence[int] | None = None
) -> LambdaLR:
    """The schedule, stepped once per optimizer step.

    Args:
        starts: the step at which each of the optimizer's groups begins to learn; None: all at 0.

    Raises:
        ConfigError: `_target_` is not a function from the share of the decay that is done to a factor.
    """
    decay = locate(config._target_, "scheduler")
    try:
        float(decay(0.5, **config.kwargs))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"scheduler._target_={config._target_} must be a function from the share of the decay that is done (0 to 1) to a factor: {error}"
        ) from error
    return LambdaLR(
        optimizer,
        [
            partial(
                factor,
                start=start,
                warmup_steps=warmup_steps(config, total_steps - start),
                total_steps=total_steps,
                decay=partial(decay, **config.kwargs),
                final_factor=config.final_factor,
            )
            for start in starts or [0] * len(optimizer.param_groups)
        ],
    )
