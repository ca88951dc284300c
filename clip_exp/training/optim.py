"""What of a dual encoder is trained, how fast, and by what: frozen parts and adapters, groups of parameters, optimizer and schedule."""

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
# What the families call their embeddings of positions: ours and open_clip's, timm's, Hugging Face's.
POSITIONS = {
    "positional_embedding", "pos_embed", "position_embeddings", "position_embedding", "relative_position_bias_table",
}  # fmt: skip
KINDS = ("decay", "no_decay", "logit_scale")


# ------------------------------------------------------------------------------------------------------ what is trained


def prepare(model: CLIP, config: FineTuneConfig, architecture: ModelConfig) -> None:
    """Freeze what the configuration keeps, and put adapters in. The logit scale and bias always learn.

    Args:
        model: with the weights that it starts from.
        architecture: of the model.

    Raises:
        ConfigError: more unfrozen blocks than there are; no layers for adapters.
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
        "text": torch.full((1, length), 5),  # no token that a tokenizer of any library pads with
    }
    for name, tower in towers.items():
        tower.requires_grad_(False)
        if getattr(config.lora, name):
            adapt(tower, config.lora, examples[name], name)


def freeze(tower: nn.Module, config: TowerTuningConfig, key: str) -> None:
    """Keep a tower's weights as they are, but for its last `unfrozen_blocks` and what follows them; `key` names its node in messages."""
    if not config.freeze:
        return
    deep, blocks = depths(tower)
    kept = blocks + 1 if config.unfrozen_blocks is None else blocks - config.unfrozen_blocks
    if kept < 0:
        raise ConfigError(f"{key}.unfrozen_blocks={config.unfrozen_blocks} is more than the {blocks} blocks there are.")
    for name, parameter in tower.named_parameters():
        parameter.requires_grad_(deep[name] > kept)


def quiet(model: nn.Module, *, probing: bool) -> Iterator[nn.Module]:
    """Yield the modules that stay in evaluation mode while the rest trains: those with weights, none of which learns.

    There batch norms keep their statistics, and nothing is dropped out. While `probing`, when only the projections learn, these are
    both towers, too.
    """
    if probing:
        yield from (getattr(model, name) for name in TOWERS)
    for module in model.modules():
        weights = list(module.parameters())
        if weights and not any(weight.requires_grad for weight in weights):
            yield module


# ------------------------------------------------------------------------------------------------------------- how fast


class Group(NamedTuple):
    """Parameters that are treated alike."""

    kind: str  # `decay` (matrices), `no_decay` (biases, norms, positions), `logit_scale`
    factor: float  # of the learning rate
    late: bool  # whether they start to learn after the linear probe


def named_groups(model: nn.Module, finetune: FineTuneConfig) -> dict[Group, list[tuple[str, nn.Parameter]]]:
    """Trained parameters by treatment, with their names; first all matrices, then the others, last the logit scale.

    The rate of a tower's parameter over the base rate is lr_factor * layer_decay ** (L + 1 - depth). During the linear probe only
    the projections of the towers learn. The logit scale has a group of its own: ZeRO flattens each group and steps a float32 copy,
    which a clamp of the parameter itself would not reach.
    """
    factors: dict[str, float] = {}
    late: set[str] = set()
    for tower in TOWERS:
        tuning: TowerTuningConfig = getattr(finetune, tower)
        if not tuning.lr_factor == tuning.layer_decay == 1:
            deep, blocks = depths(getattr(model, tower))
            for name, depth in deep.items():
                factors[f"{tower}.{name}"] = tuning.lr_factor * tuning.layer_decay ** (blocks + 1 - depth)
        if finetune.freeze_towers_steps:
            module: nn.Module = getattr(model, tower)
            below = {name for name, _ in module.named_parameters()} - projection_names(module)
            late |= {f"{tower}.{name}" for name in below}
    groups: dict[Group, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # A class token of timm has two axes of length 1 before its channels.
            token = parameter.ndim > 2 and parameter.numel() == max(parameter.shape)
            plain = parameter.ndim < 2 or token or POSITIONS & set(name.split("."))
            kind = "logit_scale" if name.endswith("logit_scale") else "no_decay" if plain else "decay"
            group = Group(kind, factors.get(name, 1.0), name in late)
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
    """Return the least and the largest logit scale of a run that starts with `start`, as natural logarithms.

    What the run starts with is never outside, unless the configuration says so.
    """
    largest = max(loss.largest_logit_scale, start) if loss.max_logit_scale is None else loss.max_logit_scale
    return min(0.0, start, largest), largest


def build_scheduler(
    optimizer: Optimizer, config: SchedulerConfig, total_steps: int, starts: Sequence[int] | None = None
) -> LambdaLR:
    """The schedule, stepped once per optimizer step.

    Args:
        starts: the step at which each of the optimizer's groups begins to learn; None: all at 0.

    Raises:
        ConfigError: `_target_` is not a function from the share of the decay that is done to a factor.
    """
    decay = locate(config.target, "scheduler")
    try:
        float(decay(0.5, **config.kwargs))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"scheduler._target_={config.target} must be a function from the share of the decay that is done (0 to 1) to a factor: {error}"
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
