"""What of a dual encoder is trained, how fast, and by what: frozen parts and adapters, groups of parameters, optimizer and schedule."""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from clip_exp.config.model import ModelConfig
from clip_exp.config.targets import build, locate
from clip_exp.config.training import (
    FineTuneConfig,
    LoRAConfig,
    LossConfig,
    OptimizerConfig,
    SchedulerConfig,
    TowerTuningConfig,
)
from clip_exp.errors import ConfigError
from clip_exp.models.build import build_model
from clip_exp.models.clip import CLIP
from clip_exp.models.depth import depths, projection_names
from clip_exp.training.lora import adapt, check_targets, layers_to_adapt
from clip_exp.training.schedule import factor

TOWERS = ("image", "text")
# What the families call their embeddings of positions: ours and open_clip's, timm's, Hugging Face's.
POSITIONS = {
    "positional_embedding",
    "pos_embed",
    "position_embeddings",
    "position_embedding",
    "relative_position_bias_table",
}
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
    towers = _towers(model)
    if config.lora is None:
        for name, tower in towers.items():
            freeze(tower, getattr(config, name), f"finetune.{name}")
        return
    check_adapted(model, config.lora)
    for name, tower in towers.items():
        tower.requires_grad_(False)
        if getattr(config.lora, name):
            adapt(tower, config.lora, _example(name, architecture), name)


def freeze(tower: nn.Module, config: TowerTuningConfig, key: str) -> None:
    """Keep a tower's weights as they are, but for its last `unfrozen_blocks` and what follows them.

    Args:
        key: of the tower's node, for messages.

    Raises:
        ConfigError: it has fewer blocks.
    """
    if not config.freeze:
        return
    deep, blocks = depths(tower)
    kept = blocks + 1 if config.unfrozen_blocks is None else blocks - config.unfrozen_blocks
    if kept < 0:
        raise ConfigError(f"{key}.unfrozen_blocks={config.unfrozen_blocks} is more than the {blocks} blocks there are.")
    for name, parameter in tower.named_parameters():
        parameter.requires_grad_(deep[name] > kept)


def check_adapted(model: CLIP, config: LoRAConfig) -> None:
    """See that the towers have the layers that are to be adapted, without running them.

    Raises:
        ConfigError: a target is in no tower, or a tower has none of them.
    """
    adapted = {name: tower for name, tower in _towers(model).items() if getattr(config, name)}
    check_targets(config.targets, adapted)
    for name, tower in adapted.items():
        layers_to_adapt(tower, config, name)


def rehearse_layers(architecture: ModelConfig, config: FineTuneConfig) -> None:
    """Build the model without memory, and look for the layers that `config` counts or names.

    Raises:
        ConfigError: see `build_model`, `freeze` and `check_adapted`.
    """
    with torch.device("meta"):
        model = build_model(architecture)
    if config.lora is None:
        prepare(model, config, architecture)
    else:  # encoders of transformers do not run without memory
        check_adapted(model, config.lora)


def _towers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: getattr(model, name) for name in TOWERS}


def _example(tower: str, architecture: ModelConfig) -> Tensor:
    if tower == "image":
        side = architecture.image.image_size
        return torch.zeros(1, 3, side, side)
    # No token that a tokenizer of any library pads with.
    return torch.full((1, architecture.text.context_length), 5)


def quiet(model: nn.Module, *, probing: bool) -> Iterator[nn.Module]:
    """The modules that stay in evaluation mode while the rest trains: those with weights, none of which learns.

    There batch norms keep their statistics, and nothing is dropped out.

    Args:
        probing: only the projections learn: both towers are in evaluation mode.
    """
    if probing:
        yield from _towers(model).values()
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


def factors(model: nn.Module, config: FineTuneConfig) -> dict[str, float]:
    """The learning rate of each parameter of the towers over the base rate: lr_factor * layer_decay ** (L + 1 - depth)."""
    found = {}
    for tower in TOWERS:
        tuning: TowerTuningConfig = getattr(config, tower)
        if tuning.lr_factor == tuning.layer_decay == 1:
            continue
        deep, blocks = depths(getattr(model, tower))
        for name, depth in deep.items():
            found[f"{tower}.{name}"] = tuning.lr_factor * tuning.layer_decay ** (blocks + 1 - depth)
    return found


def late_names(model: nn.Module) -> set[str]:
    """The parameters that do not learn during the linear probe: the towers' without their projections."""
    names: set[str] = set()
    for tower in TOWERS:
        module: nn.Module = getattr(model, tower)
        below = {name for name, _ in module.named_parameters()} - projection_names(module)
        names |= {f"{tower}.{name}" for name in below}
    return names


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
    optimizer.register_step_post_hook(partial(_clamp_logit_scale, logit_scale_range))
    return optimizer


def logit_scale_range(loss: LossConfig, start: float) -> tuple[float, float]:
    """Return the least and the largest logit scale of a run, as natural logarithms.

    What the run starts with is never outside, unless the configuration says so.

    Args:
        start: the logit scale that the run starts with.
    """
    largest = max(loss.largest_logit_scale, start) if loss.max_logit_scale is None else loss.max_logit_scale
    return min(0.0, start, largest), largest


def _clamp_logit_scale(limits: tuple[float, float], optimizer: Optimizer, *_: Any) -> None:
    with torch.no_grad():
        for group in optimizer.param_groups:
            if group.get("name") == "logit_scale":
                for parameter in group["params"]:
                    parameter.clamp_(*limits)


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


def warmup_steps(config: SchedulerConfig, total_steps: int) -> int:
    """The configured warm-up, or a tenth of the run."""
    return total_steps // 10 if config.warmup_steps is None else config.warmup_steps
