"""Tables that map the parameter names of one library to those of another, and functions that rename state dicts by them, in both directions.

Families of towers have a table for each file layout that can contain them (`names` in their configurations). Since this
module is imported with the configurations, it imports torch only when tensors are renamed.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

# Functions from our shape to that of the other library, and back
Reshape = tuple[Callable[["Tensor"], "Tensor"], Callable[["Tensor"], "Tensor"]]
Parts = str | tuple[str, ...]


def _to_kernel(patches_DP: "Tensor") -> "Tensor":
    side = math.isqrt(patches_DP.shape[1] // 3)
    return patches_DP.unflatten(1, (3, side, side))


def _transposed(matrix: "Tensor") -> "Tensor":
    return matrix.transpose(0, -1).contiguous()


def _from_flax_kernel(kernel: "Tensor") -> "Tensor":
    return kernel.permute(kernel.ndim - 1, kernel.ndim - 2, *range(kernel.ndim - 2)).contiguous()


def _to_flax_kernel(kernel_DCHW: "Tensor") -> "Tensor":
    return kernel_DCHW.permute(*range(2, kernel_DCHW.ndim), 1, 0).contiguous()


SAME: Reshape = (lambda x: x, lambda x: x)
# Kernel [D, 3, H, W] of a convolution over patches
KERNEL: Reshape = (_to_kernel, lambda kernel: kernel.flatten(1))
TRANSPOSED: Reshape = (_transposed, _transposed)
BATCHED: Reshape = (lambda x: x.unsqueeze(0), lambda x: x.squeeze(0))
TOKEN: Reshape = (lambda x_D: x_D[None, None], lambda x_11D: x_11D.flatten())
SCALAR: Reshape = (lambda x: x.squeeze(0), lambda x: x.reshape(1))
# Flax stores a matrix as [in, out], a convolution kernel as [H, W, 3, D], and the matrices of attention with an axis
# for the heads: [D, heads, E] for queries, keys and values, and [heads, E, D] for the output. Our weights do not
# contain the number of heads, so renaming to Flax does not create this axis.
FLAX_CONVOLUTION: Reshape = (_to_flax_kernel, _from_flax_kernel)
FLAX_PATCHES: Reshape = (
    lambda patches_DP: _to_flax_kernel(_to_kernel(patches_DP)),
    lambda kernel: _from_flax_kernel(kernel).flatten(1),
)
INTO_HEADS: Reshape = (_transposed, lambda kernel: _transposed(kernel.flatten(1)))
OUT_OF_HEADS: Reshape = (_transposed, lambda kernel: _transposed(kernel.flatten(0, -2)))
HEADS: Reshape = (lambda bias_D: bias_D, lambda bias: bias.flatten())


class Row(NamedTuple):
    """Row of a renaming table: a part of a name in our layout and in that of the other library.

    A part that starts with a dot is replaced anywhere in a name. Any other part is a prefix; only the first matching
    prefix is replaced. Several parts on one side are separate tensors that correspond to one tensor on the other side,
    concatenated along the first axis.
    """

    ours: Parts
    theirs: Parts
    reshape: Reshape = SAME


class Names(NamedTuple):
    """Parameter names of a tower in one file layout.

    Attributes:
        rows: renaming table.
        marks: prefixes of names that distinguish this kind of tower from others in the same layout; all must occur.
    """

    rows: tuple[Row, ...]
    marks: tuple[str, ...]

    def answers(self, names: Iterable[str]) -> bool:
        """Return True if names of parameters have all marks of this tower."""
        names = list(names)
        return all(any(name.startswith(mark) for name in names) for mark in self.marks)


def norm(ours: str, theirs: str) -> tuple[Row, ...]:
    """Return the rows of a layer norm in Flax."""
    return Row(f"{ours}weight", f"{theirs}scale"), Row(f"{ours}bias", f"{theirs}bias")


def dense(ours: str, theirs: str) -> tuple[Row, ...]:
    """Return the rows of a linear layer in Flax."""
    return Row(f"{ours}weight", f"{theirs}kernel", TRANSPOSED), Row(f"{ours}bias", f"{theirs}bias")


def into_heads(ours: str, theirs: str, *parts: str) -> tuple[Row, ...]:
    """Return the rows of linear layers of attention in Flax, such as query, key and value, which are a single layer in ours."""
    kernels, biases = (tuple(f"{theirs}{part}.{kind}" for part in parts) for kind in ("kernel", "bias"))
    return Row(f"{ours}weight", kernels, INTO_HEADS), Row(f"{ours}bias", biases, HEADS)


def out_of_heads(ours: str, theirs: str) -> tuple[Row, ...]:
    """Return the rows of the output projection of attention in Flax."""
    return Row(f"{ours}weight", f"{theirs}kernel", OUT_OF_HEADS), Row(f"{ours}bias", f"{theirs}bias")


def flax_vit(positions: str, norm_2: str, attention: str, mlp: str) -> tuple[Row, ...]:
    """Return the table of one of Google's Vision Transformers, from timm's names to Flax's.

    Args:
        positions: Flax's name of the position embedding.
        norm_2: Flax's name of the second layer norm of a block.
        attention: Flax's name of the attention of a block.
        mlp: Flax's name of the MLP of a block.
    """
    pool, pool_attention = "MAPHead_0.", "MAPHead_0.MultiHeadDotProductAttention_0."
    return (
        Row("trunk.patch_embed.proj.weight", "embedding.kernel", FLAX_CONVOLUTION),
        Row("trunk.patch_embed.proj.bias", "embedding.bias"),
        Row("trunk.cls_token", "cls"),
        Row("trunk.pos_embed", positions),
        Row("trunk.blocks.", "Transformer.encoderblock_"),
        *norm("trunk.norm.", "Transformer.encoder_norm."),
        Row("trunk.attn_pool.latent", f"{pool}probe"),
        *into_heads("trunk.attn_pool.q.", pool_attention, "query"),
        *into_heads("trunk.attn_pool.kv.", pool_attention, "key", "value"),
        *out_of_heads("trunk.attn_pool.proj.", f"{pool_attention}out."),
        *norm("trunk.attn_pool.norm.", f"{pool}LayerNorm_0."),
        *dense("trunk.attn_pool.mlp.fc1.", f"{pool}MlpBlock_0.Dense_0."),
        *dense("trunk.attn_pool.mlp.fc2.", f"{pool}MlpBlock_0.Dense_1."),
        *norm(".norm1.", ".LayerNorm_0."),
        *norm(".norm2.", f".{norm_2}."),
        *into_heads(".attn.qkv.", f".{attention}.", "query", "key", "value"),
        *out_of_heads(".attn.proj.", f".{attention}.out."),
        *dense(".mlp.fc1.", f".{mlp}.Dense_0."),
        *dense(".mlp.fc2.", f".{mlp}.Dense_1."),
    )


def rename(state: Mapping[str, "Tensor"], rows: Iterable[Row], *, to_theirs: bool) -> dict[str, "Tensor"]:
    """Rename and reshape tensors by a table. Names that are not in the table are unchanged.

    If one of several tensors that would be concatenated is missing, the others are unchanged as well.

    Args:
        state: tensors by name.
        rows: renaming table.
        to_theirs: rename to the names of the other library; False: rename to ours.
    """
    import torch

    sides = [_side(row, to_theirs) for row in rows]
    renamed: dict[str, Tensor] = {}
    pieces: dict[str, dict[int, tuple[str, Tensor]]] = defaultdict(dict)
    expected: dict[str, int] = {}
    for name, tensor in state.items():
        names, piece, count, reshape = _renamed(name, sides)
        if count > 1:
            pieces[names[0]][piece], expected[names[0]] = (name, reshape(tensor)), count
        elif len(names) == 1:
            renamed[names[0]] = reshape(tensor)
        else:
            # Copies, because safetensors refuses to save tensors that share memory.
            parts = zip(names, tensor.chunk(len(names)), strict=True)
            renamed |= {part_name: reshape(part).clone() for part_name, part in parts}
    for whole, found in pieces.items():
        if len(found) == expected[whole]:
            renamed[whole] = torch.cat([found[i][1] for i in range(expected[whole])])
        else:
            renamed |= {name: state[name] for name, _ in found.values()}
    return renamed


class _Side(NamedTuple):
    old: tuple[str, ...]
    new: tuple[str, ...]
    reshape: Callable[["Tensor"], "Tensor"]


def _side(row: Row, to_theirs: bool) -> _Side:
    ours, theirs = ((part,) if isinstance(part, str) else part for part in (row.ours, row.theirs))
    return _Side(ours, theirs, row.reshape[0]) if to_theirs else _Side(theirs, ours, row.reshape[1])


def _renamed(name: str, sides: list[_Side]) -> tuple[list[str], int, int, Callable[["Tensor"], "Tensor"]]:
    """Return the new names of a tensor, its index among the parts of a tensor, the number of parts, and the reshaping function."""
    names, piece, count, reshape = [name], 0, 1, SAME[0]
    prefix_replaced = False
    for side in sides:
        for i, old in enumerate(side.old):
            anywhere = old.startswith(".")
            if (anywhere and old not in names[0]) or (
                not anywhere and (prefix_replaced or not names[0].startswith(old))
            ):
                continue
            prefix_replaced = prefix_replaced or not anywhere
            names = [each.replace(old, new, 1) for each in names for new in side.new]
            if len(side.old) > 1:
                piece, count = i, len(side.old)
            if side.reshape is not SAME[0] and side.reshape is not SAME[1]:
                reshape = side.reshape
            break
    return names, piece, count, reshape
