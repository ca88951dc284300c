"""What is trained of a model: frozen towers and blocks, adapters, and a linear probe before the rest."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from clip_exp.config.model_schema import ModelConfig
from clip_exp.config.schema import FineTuneConfig, LoRAConfig, TowerTuningConfig
from clip_exp.errors import ConfigError
from clip_exp.models.build import build_model
from clip_exp.models.clip import CLIP
from clip_exp.models.depth import depths, projection_names
from clip_exp.training.lora import adapt, check_targets, layers_to_adapt

TOWERS = ("image", "text")


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


def late_names(model: nn.Module) -> set[str]:
    """The parameters that do not learn during the linear probe: the towers' without their projections."""
    names: set[str] = set()
    for tower in TOWERS:
        module: nn.Module = getattr(model, tower)
        below = {name for name, _ in module.named_parameters()} - projection_names(module)
        names |= {f"{tower}.{name}" for name in below}
    return names


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
