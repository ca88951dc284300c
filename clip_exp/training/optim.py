"""Trainable parameters, learning rates and the optimizer: freezing, adapters, parameter groups, optimizer and schedule."""

import hashlib
import inspect
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CyclicLR, LambdaLR, LRScheduler, OneCycleLR, ReduceLROnPlateau, SequentialLR

from clip_exp.config.finetune import FineTuneConfig, TowerTuningConfig
from clip_exp.config.model import TOWERS, ModelConfig
from clip_exp.config.optimization import OptimizerConfig, SchedulerConfig
from clip_exp.config.targets import TOTAL_STEPS, instantiate, locate
from clip_exp.config.training import LossConfig
from clip_exp.errors import ConfigError
from clip_exp.models.clip import CLIP
from clip_exp.models.depth import depths, projection_names
from clip_exp.training.lora import adapt, check_layers
from clip_exp.training.schedule import factor

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


def frozen_modules(part: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that stay in evaluation mode during training: those that have weights, all of them frozen.

    Their batch normalization keeps its statistics, and their dropout is off.

    Args:
        part: the dual encoder, or the loss.
    """
    for module in part.modules():
        weights = list(module.parameters())
        if weights and not any(weight.requires_grad for weight in weights):
            yield module


def frozen_names(loss: nn.Module) -> set[str]:
    """Return the names of the frozen weights of a loss, and of the buffers of its frozen modules, such as a teacher's."""
    names = {name for name, weight in loss.named_parameters() if not weight.requires_grad}
    frozen = set(frozen_modules(loss))
    for path, module in loss.named_modules():
        if module in frozen:
            names |= {f"{path}.{name}".lstrip(".") for name, _ in module.named_buffers()}
    return names & loss.state_dict().keys()


def hash_of(module: nn.Module, names: Collection[str]) -> str | None:
    """Return the SHA-256 of some tensors of a module's state, by name; None without names."""
    if not names:
        return None
    state, digest = module.state_dict(), hashlib.sha256()
    for name in sorted(names):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def named_parameters(model: nn.Module, loss: nn.Module | None = None) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters of the dual encoder by name, and those of the loss with the prefix `loss.`."""
    yield from model.named_parameters()
    if loss is not None:
        yield from ((f"loss.{name}", parameter) for name, parameter in loss.named_parameters())


# ------------------------------------------------------------------------------------------------------------- how fast


class Group(NamedTuple):
    """Settings that the parameters of an optimizer group share."""

    kind: str  # `decay` (matrices), `no_decay` (biases, norms, positions), `logit_scale`
    factor: float  # learning rate over the base rate
    delayed: bool  # the rate is 0 for the first `finetune.freeze_towers_steps`


def named_groups(
    model: nn.Module, finetune: FineTuneConfig, loss: nn.Module | None = None
) -> dict[Group, list[tuple[str, nn.Parameter]]]:
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
    for name, parameter in named_parameters(model, loss):
        if parameter.requires_grad:
            # Class tokens of timm have shape [1, 1, channels]: not matrices, in spite of their number of dimensions.
            token = parameter.ndim > 2 and parameter.numel() == max(parameter.shape)
            plain = parameter.ndim < 2 or token or POSITIONS & set(name.split("."))
            kind = "logit_scale" if name == "logit_scale" else "no_decay" if plain else "decay"
            group = Group(kind, factors.get(name, 1.0), name in delayed)
            groups.setdefault(group, []).append((name, parameter))
    return dict(sorted(groups.items(), key=lambda item: KINDS.index(item[0].kind)))


# ----------------------------------------------------------------------------------------------- optimizer and schedule


def build_optimizer(
    model: nn.Module,
    config: OptimizerConfig,
    finetune: FineTuneConfig | None = None,
    loss: nn.Module | None = None,
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
        loss: the loss, whose parameters are trained too.
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
        for group, members in named_groups(model, finetune or FineTuneConfig(), loss).items()
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
    optimizer: Optimizer = instantiate({"_target_": target, **arguments}, "optimizer", groups)

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
) -> LRScheduler:
    """Build the learning rate schedule, which is stepped once per optimizer step.

    Args:
        optimizer: the optimizer.
        config: the schedule configuration.
        total_steps: optimizer steps of the run.
        starts: step at which each group of the optimizer starts to learn; None: all at 0.

    Raises:
        ConfigError: `scheduler._target_` is neither a function that maps the completed fraction of the decay to a factor, nor a
            scheduler of torch, or it rejects its arguments.
    """
    found = locate(config.target, "scheduler")
    if inspect.isclass(found):
        if any(starts or ()):
            raise ConfigError(
                f"finetune.freeze_towers_steps is not supported with scheduler._target_={config.target}: use scheduler=cosine or linear."
            )
        return _torch_scheduler(found, optimizer, config, total_steps)
    arguments = _with_steps(config.arguments, total_steps)
    try:
        float(found(0.5, **arguments))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"scheduler._target_={config.target} must be a function that maps the completed fraction of the decay (0 to 1) to a factor, "
            f"or a scheduler class of torch: {error}"
        ) from error
    schedules: list[Callable[[int], float]] = [
        partial(
            factor,
            start=start,
            warmup_steps=warmup_length(config, total_steps - start),
            total_steps=total_steps,
            decay=partial(found, **arguments),
            final_factor=config.final_factor,
        )
        for start in starts or [0] * len(optimizer.param_groups)
    ]
    return LambdaLR(optimizer, schedules)


def warmup_length(config: SchedulerConfig, steps: int) -> int:
    """Return the optimizer steps of warm-up in a run, or the trained part of a run, of `steps` steps."""
    return steps // 10 if config.warmup_steps is None else config.warmup_steps


def _with_steps(arguments: dict[str, Any], steps: int) -> dict[str, Any]:
    """Replace the value of `${total_steps}` by the number of steps."""
    return {key: steps if value == TOTAL_STEPS else value for key, value in arguments.items()}


def _torch_scheduler(found: type, optimizer: Optimizer, config: SchedulerConfig, total_steps: int) -> LRScheduler:
    """Build a scheduler of torch, after a linear warm-up to the peak rate."""
    if not issubclass(found, LRScheduler) or issubclass(found, ReduceLROnPlateau):
        why = (
            "it follows a validation metric, not the optimizer steps, so a resumed run could not continue it exactly"
            if issubclass(found, ReduceLROnPlateau)
            else "it is not a torch.optim.lr_scheduler.LRScheduler"
        )
        raise ConfigError(
            f"scheduler._target_={config.target} is not supported: {why}. Use scheduler=cosine, or another schedule."
        )
    if config.final_factor:
        raise ConfigError(
            f"scheduler.final_factor={config.final_factor:g} has no effect with scheduler._target_={config.target}: leave it out, and set "
            "the arguments of the scheduler, such as eta_min."
        )
    warmup = warmup_length(config, total_steps)
    if issubclass(found, OneCycleLR | CyclicLR):
        if warmup:
            raise ConfigError(
                f"scheduler._target_={config.target} has a warm-up of its own: set scheduler.warmup_steps=0."
            )
        if len({group["lr"] for group in optimizer.param_groups}) > 1:
            raise ConfigError(
                f"scheduler._target_={config.target} gives all weights the same learning rate, so finetune.*.lr_factor and layer_decay would "
                "have no effect: leave them out, or use another schedule."
            )
    node = {"_target_": config.target, **_with_steps(config.arguments, total_steps - warmup)}
    build = partial(instantiate, node, "scheduler", optimizer, optional={TOTAL_STEPS: total_steps - warmup})
    if not warmup:
        return build()
    ramp = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warmup))
    return SequentialLR(optimizer, [ramp, build()], milestones=[warmup])


def rehearse_optimizer(
    config: OptimizerConfig, scheduler: SchedulerConfig, finetune: FineTuneConfig, total_steps: int | None
) -> None:
    """Create the optimizer and the schedule for a single layer, which finds wrong arguments before a run starts.

    Args:
        config: configuration of the optimizer.
        scheduler: configuration of the schedule.
        finetune: the fine-tuning configuration.
        total_steps: optimizer steps of the run; None: not yet known.

    Raises:
        ConfigError: the optimizer or the scheduler does not exist, or rejects its arguments.
    """
    optimizer = build_optimizer(nn.Linear(2, 2), config)
    if any(not tower.lr_factor == tower.layer_decay == 1 for tower in (finetune.image, finetune.text)):
        # Rates differ between groups, as they will in the run: a schedule that sets one rate for all is found here.
        optimizer.param_groups[0]["lr"] *= 0.5
    starts = [finetune.freeze_towers_steps] * len(optimizer.param_groups)
    build_scheduler(optimizer, scheduler, total_steps or 1000, starts)
