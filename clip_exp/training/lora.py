"""Low-rank adapters (Hu et al. 2022): put into towers by `peft`, and merged into plain weights wherever weights are kept.

In a state dict an adapted layer `x` is `x.base_layer.weight`, `x.lora_A.default.weight` (A, rank x in) and
`x.lora_B.default.weight` (B, out x rank); merged it is `x.weight` = W + alpha / rank * B A.
"""

import logging
import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from clip_exp.config.training import LoRAConfig
from clip_exp.errors import ConfigError
from clip_exp.models.depth import depths

log = logging.getLogger(__name__)
BASE, A, B = ".base_layer.", ".lora_A.default.weight", ".lora_B.default.weight"


def adapt(tower: nn.Module, config: LoRAConfig, example: Tensor, key: str) -> None:
    """Give the linear layers of a tower's blocks adapters that change nothing yet (B is zero). Its own weights no longer learn.

    Args:
        example: an input of the tower.
        key: of the tower in `finetune.lora`, for messages.

    Raises:
        ConfigError: `targets` names a layer whose weights the tower reads without calling it; or there is none to adapt.
    """
    from peft import LoraConfig, inject_adapter_in_model

    inside = layers_to_adapt(tower, config, key)
    called = _called(tower, example)
    chosen = [name for name in inside if name in called]
    silent = [name for name in inside if name not in called]
    if silent and config.targets:
        raise ConfigError(
            f"finetune.lora.targets: {silent[0]} of the {key} tower is not called in a forward pass (another module reads its "
            "weights), so an adapter would do nothing. Leave it out."
        )
    if silent:
        log.warning(
            f"finetune.lora: the {key} tower has {len(silent)} linear layers without adapters, {silent[0]} first: "
            "the modules around them read their weights without calling them."
        )
    if not chosen:
        raise _nothing(key, "that a forward pass calls")
    settings = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type] # peft divides it by the rank; it need not be whole
        lora_dropout=config.dropout,
        target_modules="|".join(map(re.escape, chosen)),
    )
    inject_adapter_in_model(settings, tower)


def check_layers(towers: dict[str, nn.Module], config: LoRAConfig) -> None:
    """Raise a ConfigError where a target is in none of the towers that get adapters, or one of these has nothing to adapt."""
    adapted = {key: tower for key, tower in towers.items() if getattr(config, key)}
    unknown = [end for end in config.targets if not any(named_layers(tower, [end]) for tower in adapted.values())]
    if unknown:
        found = [
            f"the {key} tower has {', '.join(sorted({name.rpartition('.')[2] for name in _linear(tower)}))}"
            for key, tower in adapted.items()
        ]
        raise ConfigError(
            f"finetune.lora.targets={unknown}: there are no linear layers of that name; {'; '.join(found)}."
        )
    for key, tower in adapted.items():
        layers_to_adapt(tower, config, key)


def layers_to_adapt(tower: nn.Module, config: LoRAConfig, key: str) -> list[str]:
    """Return the linear layers that `targets` names, or all of the blocks; raise a ConfigError where there is none."""
    if config.targets:
        inside = named_layers(tower, config.targets)
    else:
        of, blocks = depths(tower)
        inside = [name for name in _linear(tower) if 0 < of.get(f"{name}.weight", 0) <= blocks]
    if not inside:
        raise _nothing(key, f"that end in {', '.join(config.targets)}" if config.targets else "in its blocks")
    return inside


def _nothing(key: str, which: str) -> ConfigError:
    return ConfigError(f"finetune.lora: the {key} tower has no linear layers {which}. Set finetune.lora.{key}=false.")


def named_layers(tower: nn.Module, ends: list[str]) -> list[str]:
    """The linear layers of a tower whose names end in one of `ends`, whole parts of names compared."""
    return [name for name in _linear(tower) if any(f".{name}".endswith(f".{end}") for end in ends)]


def _linear(tower: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in tower.named_modules() if isinstance(module, nn.Linear)}


def _called(tower: nn.Module, example: Tensor) -> set[str]:
    """The linear layers that a forward pass calls: adapters act there, and nowhere where a module reads another's weights.

    `nn.MultiheadAttention` does, and peft's way around it changes the frozen weights by rounding.
    """
    called: set[str] = set()
    handles = [
        module.register_forward_hook(lambda *_, name=name: called.add(name)) for name, module in _linear(tower).items()
    ]
    training = {module: module.training for module in tower.modules()}
    with torch.no_grad():
        tower.eval()(example)
    for module, mode in training.items():
        module.training = mode
    for handle in handles:
        handle.remove()
    return called


def merge(state: Mapping[str, Tensor], config: LoRAConfig | None) -> dict[str, Tensor]:
    """The same model without adapters, the adapted weights in float32; the other tensors are shared.

    Args:
        state: of an adapted model, or of any part that holds whole layers.
        config: None where there are no adapters.
    """
    if config is None:
        return dict(state)
    plain = {name.replace(BASE, "."): value for name, value in state.items() if not name.endswith((A, B))}
    for name, factor in state.items():
        if name.endswith(A):
            layer = name.removesuffix(A)
            # In double precision: a product of float32 may be rounded to TF32 while training.
            update = state[f"{layer}{B}"].double() @ factor.double() * (config.alpha / config.rank)
            plain[f"{layer}.weight"] = (state[f"{layer}{BASE}weight"].double() + update).float()
    return plain


def adapted_part(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `merge` changes: the adapted weights as they were, and their factors."""
    return {name: value for name, value in state.items() if name.endswith((A, B, f"{BASE}weight"))}


def unmerge(plain: Mapping[str, Tensor], adapted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `merge`: the state dict that `adapted_part` was taken from, bit by bit."""
    layers = [name.removesuffix(f"{BASE}weight") for name in adapted if name.endswith(f"{BASE}weight")]
    inside = {f"{layer}.{kind}": f"{layer}{BASE}{kind}" for layer in layers for kind in ("weight", "bias")}
    return {inside.get(name, name): value for name, value in plain.items()} | dict(adapted)
