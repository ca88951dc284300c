"""Low-rank adapters (LoRA, Hu et al. 2022): inserted into towers by `peft`, and merged into plain weights when weights are saved.

In a state dict an adapted layer `x` is `x.base_layer.weight`, `x.lora_A.default.weight` (A, rank x in) and
`x.lora_B.default.weight` (B, out x rank); merged it is `x.weight` = W + alpha / rank * B A.
"""

import logging
import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from clip_exp.config.finetune import LoRAConfig
from clip_exp.errors import ConfigError
from clip_exp.models.depth import depths

log = logging.getLogger(__name__)
BASE, A, B = ".base_layer.", ".lora_A.default.weight", ".lora_B.default.weight"


def adapt(tower: nn.Module, config: LoRAConfig, example: Tensor, key: str) -> None:
    """Add adapters to the linear layers of a tower's blocks, and freeze its own weights. B is zero, so outputs do not change yet.

    Args:
        tower: the tower.
        config: the configuration of the adapters.
        example: an input of the tower.
        key: name of the tower in `finetune.lora`, for messages.

    Raises:
        ConfigError: there is no layer to adapt, or `targets` names one that is not called in a forward pass.
    """
    from peft import LoraConfig, inject_adapter_in_model

    inside = layers_to_adapt(tower, config, key)
    called = _called(tower, example)
    chosen = [name for name in inside if name in called]
    uncalled = [name for name in inside if name not in called]
    if uncalled and config.targets:
        raise ConfigError(
            f"finetune.lora.targets: {uncalled[0]} of the {key} tower is not called in a forward pass (another module reads its "
            "weights), so an adapter would do nothing. Leave it out."
        )
    if uncalled:
        log.warning(
            f"finetune.lora: the {key} tower has {len(uncalled)} linear layers that cannot have adapters, such as {uncalled[0]}: "
            "other modules read their weights without calling them."
        )
    if not chosen:
        raise _no_layers(key, "that a forward pass calls")
    settings = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type] # peft divides it by the rank; it need not be whole
        lora_dropout=config.dropout,
        target_modules="|".join(map(re.escape, chosen)),
    )
    inject_adapter_in_model(settings, tower)


def check_layers(towers: dict[str, nn.Module], config: LoRAConfig) -> None:
    """Raise a ConfigError if a target exists in no tower that gets adapters, or if one of these towers has no layers to adapt."""
    adapted = {key: tower for key, tower in towers.items() if getattr(config, key)}
    unknown = [end for end in config.targets if not any(named_layers(tower, [end]) for tower in adapted.values())]
    if unknown:
        found = [
            f"the {key} tower has {', '.join(sorted({name.rpartition('.')[2] for name in _linear(tower)}))}"
            for key, tower in adapted.items()
        ]
        raise ConfigError(f"finetune.lora.targets={unknown}: no linear layer has such a name; {'; '.join(found)}.")
    for key, tower in adapted.items():
        layers_to_adapt(tower, config, key)


def layers_to_adapt(tower: nn.Module, config: LoRAConfig, key: str) -> list[str]:
    """Return the names of the linear layers that match `targets`, or of all in the blocks; raise a ConfigError if there are none."""
    if config.targets:
        inside = named_layers(tower, config.targets)
    else:
        of, blocks = depths(tower)
        inside = [name for name in _linear(tower) if 0 < of.get(f"{name}.weight", 0) <= blocks]
    if not inside:
        raise _no_layers(key, f"that end in {', '.join(config.targets)}" if config.targets else "in its blocks")
    return inside


def _no_layers(key: str, which: str) -> ConfigError:
    return ConfigError(f"finetune.lora: the {key} tower has no linear layers {which}. Set finetune.lora.{key}=false.")


def named_layers(tower: nn.Module, ends: list[str]) -> list[str]:
    """Return the names of a tower's linear layers that end in one of `ends`, compared by whole dotted parts."""
    return [name for name in _linear(tower) if any(f".{name}".endswith(f".{end}") for end in ends)]


def _linear(tower: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in tower.named_modules() if isinstance(module, nn.Linear)}


def _called(tower: nn.Module, example: Tensor) -> set[str]:
    """Return the names of the linear layers that a forward pass calls: an adapter only acts when its layer is called.

    `nn.MultiheadAttention` reads the weights of its output layer without calling it, and peft's workaround changes the frozen weights by
    rounding.
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
    """Return the state dict of the same model without adapters. Adapted weights are float32, the other tensors are shared.

    Args:
        state: state dict of an adapted model, or of any part of it that contains whole layers.
        config: configuration of the adapters; None: there are none.
    """
    if config is None:
        return dict(state)
    plain = {name.replace(BASE, "."): value for name, value in state.items() if not name.endswith((A, B))}
    for name, factor in state.items():
        if name.endswith(A):
            layer = name.removesuffix(A)
            # In float64, because float32 products may be computed in TF32 during training.
            update = state[f"{layer}{B}"].double() @ factor.double() * (config.alpha / config.rank)
            plain[f"{layer}.weight"] = (state[f"{layer}{BASE}weight"].double() + update).float()
    return plain


def adapted_part(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors that `merge` changes or drops: the base weights of adapted layers, and the factors."""
    return {name: value for name, value in state.items() if name.endswith((A, B, f"{BASE}weight"))}


def unmerge(plain: Mapping[str, Tensor], adapted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Invert `merge`: return exactly the state dict that `adapted_part` was taken from."""
    layers = [name.removesuffix(f"{BASE}weight") for name in adapted if name.endswith(f"{BASE}weight")]
    inside = {f"{layer}.{kind}": f"{layer}{BASE}{kind}" for layer in layers for kind in ("weight", "bias")}
    return {inside.get(name, name): value for name, value in plain.items()} | dict(adapted)
