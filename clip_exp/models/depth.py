"""How deep each weight of a tower lies, for any tower: what freezing and layer-wise learning rates go by."""

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

# What the weights of a tower begin with that map its channels to the shared space, in the towers of every library.
PROJECTIONS = ("projection", "proj", "text_projection", "head")


class Depths(NamedTuple):
    """The weights of a tower, from its input to its features."""

    of: dict[str, int]  # by parameter: 0 for the embeddings, i + 1 for block i, blocks + 1 for what follows
    blocks: int


def depths(tower: nn.Module) -> Depths:
    """How deep each parameter of a tower lies.

    A backbone of timm says so itself. Elsewhere the blocks are the repeated modules (`block_names`), and what is registered
    before the first of them comes before them.
    """
    for name, module in tower.named_modules():
        if hasattr(module, "group_matcher"):
            return _as_timm_says(tower, name, module)
    blocks = block_names(tower)
    below = {name: 0 for name, _ in tower.named_parameters()}
    reached = 0
    for name in below:
        block = next((i for i, block in enumerate(blocks, start=1) if name.startswith(f"{block}.")), None)
        # Past the first block, what is in no block comes after the last one.
        reached = block or (len(blocks) + 1 if reached else 0)
        below[name] = len(blocks) + 1 if _projects(name) else reached
    return Depths(below, len(blocks))


def block_names(tower: nn.Module) -> list[str]:
    """The modules that a tower repeats, in order: those of the class that its lists and sequences hold most of.

    Blocks may be spread over several lists, as the stages of a residual network are.
    """
    found = list(_elements(tower, ""))
    if not found:
        return []
    kind = Counter(type(module) for _, module in found).most_common(1)[0][0]
    return [name for name, module in found if type(module) is kind]


def projection_names(tower: nn.Module) -> set[str]:
    """The parameters that map a tower's channels to the shared space; where none is called so, the deepest of all."""
    of = depths(tower).of
    named = {name for name in of if _projects(name)}
    return named or {name for name, depth in of.items() if depth == max(of.values())}


def _projects(name: str) -> bool:
    return name.split(".")[0] in PROJECTIONS


def _elements(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """What the outermost lists and sequences hold, leaving out what has no weights."""
    holds = isinstance(module, nn.ModuleList | nn.Sequential)
    for name, child in module.named_children():
        below = f"{path}.{name}" if path else name
        if _projects(below) or not any(True for _ in child.parameters()):
            continue
        if holds and not isinstance(child, nn.ModuleList | nn.Sequential):
            yield below, child
        else:
            yield from _elements(child, below)


def _as_timm_says(tower: nn.Module, trunk_name: str, trunk: nn.Module) -> Depths:
    from timm.models import group_parameters

    layers = group_parameters(trunk, trunk.group_matcher(coarse=False), reverse=True)  # type: ignore[operator]
    prefix = f"{trunk_name}." if trunk_name else ""
    blocks = max(layers.values())
    return Depths(
        {name: layers.get(name.removeprefix(prefix), blocks + 1) for name, _ in tower.named_parameters()}, blocks
    )
