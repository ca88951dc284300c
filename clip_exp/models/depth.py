"""Depth of each parameter in a tower of any library, for freezing, layer-wise learning rates and adapters."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn

# First parts of the names of the projection to the shared space, in the towers of all libraries.
PROJECTIONS = ("projection", "proj", "text_projection", "head")
WITH_PREVIOUS = 99999  # suffix in timm's patterns that groups parameters with the previous ones
Key = tuple[float, ...]


class Depths(NamedTuple):
    """Depths of the parameters of a tower."""

    of: dict[
        str, int
    ]  # by parameter name: 0 for the embeddings, i + 1 for block i, blocks + 1 for the layers after the blocks
    blocks: int  # number of blocks


def depths(tower: nn.Module) -> Depths:
    """Return the depth of each parameter of a tower.

    Backbones of timm define their blocks themselves; in other towers, blocks are the modules in module lists. The depth of other
    parameters follows from the order of registration: parameters before the first block are embeddings, parameters between two blocks
    belong to the second one, and parameters after the last block (final norm, pooling, projection) have the largest depth.
    """
    names = [name for name, _ in tower.named_parameters()]
    block_of = _blocks_of_timm(tower, names) or _blocks_of_lists(tower, names)
    blocks = max(block_of.values(), default=0)
    of, depth = {}, blocks + 1
    for name in reversed(names):
        depth = block_of.get(name, depth)
        of[name] = depth
    for name in _inputs(tower, names, block_of):
        of[name] = 0
    for name in names:
        if is_projection(name):
            of[name] = blocks + 1
    return Depths({name: of[name] for name in names}, blocks)


def projection_names(tower: nn.Module) -> set[str]:
    """Return the names of the projection parameters, which map to the shared space; if none has such a name, the deepest parameters."""
    of = depths(tower).of
    named = {name for name in of if is_projection(name)}
    return named or {name for name, depth in of.items() if depth == max(of.values())}


def is_projection(name: str) -> bool:
    """Return True if a tower's parameter belongs to the projection to the shared space."""
    return name.split(".")[0] in PROJECTIONS


def _inputs(tower: nn.Module, names: list[str], block_of: Mapping[str, int]) -> Iterator[str]:
    """Yield the parameters that are used before the blocks.

    These include embeddings that are registered after the blocks, and the siblings that follow them: some encoders of transformers
    register relative positions, and their norm, after the blocks.
    """
    embeddings = {f"{path}.weight" for path, module in tower.named_modules() if isinstance(module, nn.Embedding)}
    in_blocks, siblings = False, ""
    for name in names:
        if name in block_of:
            in_blocks = True
            continue
        if in_blocks and name in embeddings:
            parent = name.rpartition(".")[0].rpartition(".")[0]
            siblings = f"{parent}." if parent else name
        if not in_blocks or (siblings and name.startswith(siblings)):
            yield name


def _blocks_of_timm(tower: nn.Module, names: list[str]) -> dict[str, int]:
    """Return the number of each parameter's block, from 1, by timm's patterns for layer-wise learning rates; empty if there are none.

    A block is a group for which a pattern captures numbers. Unlike timm, a final norm is not part of the last block, and pooling is not
    a block.
    """
    for path, module in tower.named_modules():
        matcher = module.group_matcher(coarse=False) if hasattr(module, "group_matcher") else None
        if isinstance(matcher, dict):
            prefix = f"{path}." if path else ""
            keys = {name: _key(name.removeprefix(prefix), matcher) for name in names if name.startswith(prefix)}
            return _numbered({name: key for name, key in keys.items() if key is not None})
    return {}


def _key(name: str, matcher: Mapping[str, Any]) -> Key | None:
    """Return the sort key of the block that a parameter of a timm backbone belongs to; None if it belongs to none."""
    for order, (group, patterns) in enumerate(matcher.items()):
        for pattern, suffix in [(patterns, None)] if isinstance(patterns, str) else patterns or ():
            if match := re.match(pattern, name):
                if group == "stem" or not match.groups():
                    return None
                within = re.match(r"\.blocks\.(\d+)\.", name[match.end() :])  # some patterns capture stages only
                numbers = (*match.groups(), *(within.groups() if within else ()))
                return (order, *map(float, numbers), *(suffix or ()))
    return None


def _numbered(keys: Mapping[str, Key]) -> dict[str, int]:
    stages = {key[:-1] for key in keys.values()}
    order = sorted(set(keys.values()) - stages)
    while order and order[-1][-1] == WITH_PREVIOUS:  # the norm of the last stage
        order.pop()
    number, numbers = 0, {}
    for key in order:
        number += not number or key[-1] != WITH_PREVIOUS
        numbers[key] = number
    return {name: numbers[key] for name, key in keys.items() if key in numbers}


def _blocks_of_lists(tower: nn.Module, names: list[str]) -> dict[str, int]:
    """Return the number of each parameter's block, from 1. Blocks are modules in lists and sequences that have submodules with weights.

    Blocks may be spread over several lists, as in the stages of a residual network, and have several classes. If no module has
    submodules, blocks are the modules of the most frequent class.
    """
    found = list(_elements(tower, ""))
    blocks = [path for path, module in found if any(list(child.parameters()) for child in module.children())]
    if found and not blocks:
        kind = Counter(type(module) for _, module in found).most_common(1)[0][0]
        blocks = [path for path, module in found if type(module) is kind]
    return {name: i for i, path in enumerate(blocks, start=1) for name in names if name.startswith(f"{path}.")}


def _elements(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield the names and modules in the outermost lists and sequences, without those that have no weights."""
    holds = isinstance(module, nn.ModuleList | nn.Sequential)
    for name, child in module.named_children():
        full = f"{path}.{name}" if path else name
        if is_projection(full) or not any(True for _ in child.parameters()):
            continue
        if holds and not isinstance(child, nn.ModuleList | nn.Sequential):
            yield full, child
        else:
            yield from _elements(child, full)
