"""How deep each weight of a tower lies, for any tower: what freezing and layer-wise learning rates go by."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn

# What the weights of a tower begin with that map its channels to the shared space, in the towers of every library.
PROJECTIONS = ("projection", "proj", "text_projection", "head")
WITH_PREVIOUS = 99999  # what timm's patterns end in where weights go with those before them
Key = tuple[float, ...]


class Depths(NamedTuple):
    """The weights of a tower, from its input to its features."""

    of: dict[str, int]  # by parameter: 0 for the embeddings, i + 1 for block i, blocks + 1 for what follows
    blocks: int


def depths(tower: nn.Module) -> Depths:
    """Return how deep each parameter of a tower lies.

    Which weights are blocks, a backbone of timm says itself; elsewhere blocks are the modules that the tower's lists hold. For the
    rest the order of registration decides: what stands before the first block comes before it, what stands between two goes with
    the second, and what stands behind the last one follows: final norm, pooling, projection.
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
    """The parameters that map a tower's channels to the shared space; where none is called so, the deepest of all."""
    of = depths(tower).of
    named = {name for name in of if is_projection(name)}
    return named or {name for name, depth in of.items() if depth == max(of.values())}


def is_projection(name: str) -> bool:
    """Return whether a tower's parameter maps its channels to the shared space."""
    return name.split(".")[0] in PROJECTIONS


def _inputs(tower: nn.Module, names: list[str], block_of: Mapping[str, int]) -> Iterator[str]:
    """The parameters that come before the blocks.

    An embedding does wherever it is registered, and so do its later siblings: transformers' encoders have relative positions, and
    the norm of these, behind their blocks.
    """
    embeddings = {f"{path}.weight" for path, module in tower.named_modules() if isinstance(module, nn.Embedding)}
    begun, siblings = False, ""
    for name in names:
        if name in block_of:
            begun = True
            continue
        if begun and name in embeddings:
            parent = name.rpartition(".")[0].rpartition(".")[0]
            siblings = f"{parent}." if parent else name
        if not begun or (siblings and name.startswith(siblings)):
            yield name


def _blocks_of_timm(tower: nn.Module, names: list[str]) -> dict[str, int]:
    """By parameter the number of its block, from 1, by the patterns of timm's layer-wise learning rates; empty without such.

    A block is what a pattern captures numbers of. timm counts a final norm to the last block, and pooling as a block of its own.
    """
    for path, module in tower.named_modules():
        matcher = module.group_matcher(coarse=False) if hasattr(module, "group_matcher") else None
        if isinstance(matcher, dict):
            prefix = f"{path}." if path else ""
            keys = {name: _key(name.removeprefix(prefix), matcher) for name in names if name.startswith(prefix)}
            return _numbered({name: key for name, key in keys.items() if key is not None})
    return {}


def _key(name: str, matcher: Mapping[str, Any]) -> Key | None:
    """What orders the blocks of a timm backbone; None: the parameter is in none."""
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
    """By parameter the number of its block, from 1: the modules of several parts that lists and sequences hold.

    Blocks may be spread over several lists, as the stages of a residual network are, and be of several classes. Where nothing has
    parts, blocks are the modules of the class that occurs most.
    """
    found = list(_elements(tower, ""))
    blocks = [path for path, module in found if any(list(child.parameters()) for child in module.children())]
    if found and not blocks:
        kind = Counter(type(module) for _, module in found).most_common(1)[0][0]
        blocks = [path for path, module in found if type(module) is kind]
    return {name: i for i, path in enumerate(blocks, start=1) for name in names if name.startswith(f"{path}.")}


def _elements(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """What the outermost lists and sequences hold, leaving out what has no weights."""
    holds = isinstance(module, nn.ModuleList | nn.Sequential)
    for name, child in module.named_children():
        below = f"{path}.{name}" if path else name
        if is_projection(below) or not any(True for _ in child.parameters()):
            continue
        if holds and not isinstance(child, nn.ModuleList | nn.Sequential):
            yield below, child
        else:
            yield from _elements(child, below)
