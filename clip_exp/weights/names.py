"""Between our parameter names and those of open_clip and of transformers. Both ways give the same numbers; only names and shapes differ.

open_clip's classes are also the layout of OpenAI's checkpoints. A file of open_clip has its image tower below `visual.`. The text
tower is below `text.` (CustomTextCLIP), or below nothing (CLIP).

The way to transformers' CLIPModel and SiglipModel leads through open_clip's names, which the same towers have there. What differs
from those are names, the projections of queries, keys and values, which transformers holds apart, and axes of length one.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from clip_exp.config.model import ImageTower, ModelConfig, TextTower
from clip_exp.open_clip_files import has_text_below, open_clip_values
from clip_exp.weights.configurations import huggingface_config

Reshape = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]  # from ours to theirs, from theirs to ours


def _to_kernel(patches_DP: Tensor) -> Tensor:
    side = math.isqrt(patches_DP.shape[1] // 3)
    return patches_DP.unflatten(1, (3, side, side))


def _transposed(matrix: Tensor) -> Tensor:
    return matrix.T.contiguous()


SAME: Reshape = (lambda x: x, lambda x: x)
KERNEL: Reshape = (_to_kernel, lambda kernel: kernel.flatten(1))
TRANSPOSED: Reshape = (_transposed, _transposed)
BATCHED: Reshape = (lambda x: x.unsqueeze(0), lambda x: x.squeeze(0))
TOKEN: Reshape = (lambda x_D: x_D[None, None], lambda x_11D: x_11D.flatten())
SCALAR: Reshape = (lambda x: x.squeeze(0), lambda x: x.reshape(1))


class Row(NamedTuple):
    """A part of a name. One that begins with a dot is replaced anywhere; of the others, the first that a name begins with."""

    ours: str
    theirs: str
    reshape: Reshape = SAME


BLOCK = [
    Row(".blocks.", ".resblocks."),
    Row(".attention.qkv.", ".attn.in_proj_"),
    Row(".attention.out.", ".attn.out_proj."),
    Row(".mlp.fc.", ".mlp.c_fc."),
    Row(".mlp.proj.", ".mlp.c_proj."),
]
TIMM_BLOCK = [
    Row(".ln_1.", ".norm1."),
    Row(".attention.qkv.", ".attn.qkv."),
    Row(".attention.out.", ".attn.proj."),
    Row(".ln_2.", ".norm2."),
    Row(".mlp.fc.", ".mlp.fc1."),
    Row(".mlp.proj.", ".mlp.fc2."),
]
IMAGE: dict[ImageTower, list[Row]] = {
    ImageTower.vit: [
        Row("patch_embedding.", "conv1.", KERNEL),
        Row("projection.weight", "proj", TRANSPOSED),
        *BLOCK,
    ],
    ImageTower.resnet: [
        *(Row(f"stem.{kind}{i}.", f"{kind}{i}.") for kind in ("conv", "bn") for i in (1, 2, 3)),
        *(Row(f"stages.{i}.", f"layer{i + 1}.") for i in range(4)),
        Row("pool.positional_embedding", "attnpool.positional_embedding"),
        Row("pool.attention.q.", "attnpool.q_proj."),
        Row("pool.attention.key_", "attnpool.k_proj."),
        Row("pool.attention.value_", "attnpool.v_proj."),
        Row("pool.attention.out.", "attnpool.c_proj."),
        Row(".shortcut.conv.", ".downsample.0."),
        Row(".shortcut.bn.", ".downsample.1."),
    ],
    ImageTower.siglip: [
        Row("patch_embedding.weight", "trunk.patch_embed.proj.weight", KERNEL),
        Row("patch_embedding.bias", "trunk.patch_embed.proj.bias"),
        Row("positional_embedding", "trunk.pos_embed", BATCHED),
        Row("transformer.blocks.", "trunk.blocks."),
        Row("ln_post.", "trunk.norm."),
        Row("pool.latent", "trunk.attn_pool.latent", TOKEN),
        Row("pool.attention.q.", "trunk.attn_pool.q."),
        Row("pool.attention.key_", "trunk.attn_pool.k."),
        Row("pool.attention.value_", "trunk.attn_pool.v."),
        Row("pool.attention.out.", "trunk.attn_pool.proj."),
        Row("pool.ln.", "trunk.attn_pool.norm."),
        Row("pool.mlp.", "trunk.attn_pool.mlp."),
        *TIMM_BLOCK,
    ],
    ImageTower.timm: [
        Row("projection.weight", "head.proj.weight"),
        Row("projection.0.", "head.mlp.fc1."),
        Row("projection.2.", "head.mlp.fc2."),
    ],
    ImageTower.open_clip: [],
}
TEXT: dict[TextTower, list[Row]] = {
    TextTower.clip: [Row("projection.weight", "text_projection", TRANSPOSED), *BLOCK],
    TextTower.siglip: [Row("projection.", "text_projection."), *BLOCK],
    TextTower.huggingface: [Row("encoder.", "transformer."), Row("projection.", "proj.")],
    TextTower.open_clip: [],
}
TOP = [Row("logit_scale", "logit_scale", SCALAR), Row("logit_bias", "logit_bias", SCALAR)]
# timm keeps the projections of keys and values as one.
KEY_VALUE = ("visual.trunk.attn_pool.kv.", ("visual.trunk.attn_pool.k.", "visual.trunk.attn_pool.v."))
# Stored in some files, but no weights: OpenAI's three numbers, and constants of early versions of open_clip and transformers.
NOT_WEIGHTS = {"input_resolution", "context_length", "vocab_size", "attn_mask", "position_ids"}
DECODER = "text_decoder."  # CoCa's, which is in neither tower
# The layouts that are read, each by the part below which it has its image tower, with the first parts of all its names.
BOTH = {"logit_scale", "logit_bias"}
LAYOUTS = {
    "image": BOTH | {"image", "text"},
    "visual": BOTH
    | NOT_WEIGHTS
    | {"visual", "text", "transformer", "token_embedding", "positional_embedding", "ln_final", "text_projection"}
    | {"text_decoder"},
    "vision_model": BOTH | {"vision_model", "text_model", "visual_projection", "text_projection"},
}


def to_ours(layout: str | None, state: dict[str, Tensor], config: ModelConfig | None = None) -> dict[str, Tensor]:
    """Return the state dict under our names.

    Args:
        layout: one of LAYOUTS; None: no model's.
        config: of the model that the weights are for. It counts for towers of other libraries, whose names it must tell; towers of
            ours are told by the weights' names.
    """
    if layout == "visual":
        return from_open_clip(state, config if config is not None and config.has_foreign_tower else None)
    return from_huggingface(state) if layout == "vision_model" else state


def to_open_clip(state: dict[str, Tensor], config: ModelConfig | None = None) -> dict[str, Tensor]:
    """A state dict that open_clip loads strictly, from ours. Tensors are shared where the shape allows.

    Args:
        config: of the model; without one, the names tell whether its towers are `vit`, `resnet`, `siglip` or `clip`.

    Returns:
        CLIP's names where the text tower is CLIP's, or the architecture is one of open_clip's that has them; else
        CustomTextCLIP's.
    """
    image = config.image.kind if config else _our_image_tower(state)
    text = config.text.kind if config else _our_text_tower(state)
    flat = text is TextTower.clip
    if config is not None and text is TextTower.open_clip:
        flat = not has_text_below(open_clip_values(config.open_clip_name))
    text_prefix = "" if flat else "text."
    theirs = {}
    for name, tensor in state.items():
        if name.startswith("image."):
            prefix, own, rows = "visual.", name.removeprefix("image."), IMAGE[image]
        elif name.startswith("text."):
            prefix, own, rows = text_prefix, name.removeprefix("text."), TEXT[text]
        else:
            prefix, own, rows = "", name, TOP
        own, tensor = _rename(own, tensor, rows, to_theirs=True)
        theirs[prefix + own] = tensor
    return _join(theirs, *KEY_VALUE)


def from_open_clip(state: dict[str, Tensor], config: ModelConfig | None = None) -> dict[str, Tensor]:
    """Our state dict from that of a model of open_clip; names that it does not know pass through.

    Args:
        config: of our model; without one, the names tell which of our towers have these weights.
    """
    image = config.image.kind if config else _their_image_tower(state)
    text = config.text.kind if config else _their_text_tower(state)
    if image is ImageTower.siglip:
        state = _split(state, *KEY_VALUE)
    ours = {}
    for name, tensor in state.items():
        if name.rpartition(".")[2] in NOT_WEIGHTS or name.startswith(DECODER):
            continue
        if name.startswith("visual."):
            prefix, own, rows = "image.", name.removeprefix("visual."), IMAGE[image]
        elif name in ("logit_scale", "logit_bias"):
            prefix, own, rows = "", name, TOP
        else:
            prefix, own, rows = "text.", name.removeprefix("text."), TEXT[text]
        own, tensor = _rename(own, tensor, rows, to_theirs=False)
        ours[prefix + own] = tensor
    return ours


def _rename(name: str, tensor: Tensor, rows: list[Row], to_theirs: bool) -> tuple[str, Tensor]:
    """The name below its tower, and the tensor, from one side of a table to the other."""
    sides = [
        (row.ours, row.theirs, row.reshape[0]) if to_theirs else (row.theirs, row.ours, row.reshape[1]) for row in rows
    ]
    for old, new, reshape in sides:
        if not old.startswith(".") and name.startswith(old):
            name, tensor = new + name.removeprefix(old), reshape(tensor)
            break
    for old, new, _ in sides:
        if old.startswith("."):
            name = name.replace(old, new)
    return name, tensor


def _our_image_tower(state: dict[str, Tensor]) -> ImageTower:
    if _any_below(state, "image.stem."):
        return ImageTower.resnet
    return ImageTower.siglip if "image.pool.latent" in state else ImageTower.vit


def _our_text_tower(state: dict[str, Tensor]) -> TextTower:
    return TextTower.siglip if "text.projection.bias" in state else TextTower.clip


def _their_image_tower(state: dict[str, Tensor]) -> ImageTower:
    if _any_below(state, "visual.layer1."):
        return ImageTower.resnet
    if "visual.trunk.attn_pool.latent" in state:
        return ImageTower.siglip
    return ImageTower.timm if _any_below(state, "visual.trunk.") else ImageTower.vit


def _their_text_tower(state: dict[str, Tensor]) -> TextTower:
    if "text.text_projection.bias" in state:
        return TextTower.siglip
    own = "text.token_embedding.weight" in state or "token_embedding.weight" in state
    return TextTower.clip if own else TextTower.huggingface


def _any_below(state: dict[str, Tensor], beginning: str) -> bool:
    return any(name.startswith(beginning) for name in state)


# Between open_clip's names and transformers', on the way from and to ours.

# (open_clip's, transformers'): the first beginning that fits is replaced, then the parts of a block.
TRANSFORMERS_CLIP = [
    ("visual.class_embedding", "vision_model.embeddings.class_embedding"),
    ("visual.conv1.", "vision_model.embeddings.patch_embedding."),
    ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    ("visual.ln_pre.", "vision_model.pre_layrnorm."),
    ("visual.transformer.resblocks.", "vision_model.encoder.layers."),
    ("visual.ln_post.", "vision_model.post_layernorm."),
    ("visual.proj", "visual_projection.weight"),
    ("token_embedding.", "text_model.embeddings.token_embedding."),
    ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    ("transformer.resblocks.", "text_model.encoder.layers."),
    ("ln_final.", "text_model.final_layer_norm."),
    ("text_projection", "text_projection.weight"),
]
TRANSFORMERS_SIGLIP = [
    ("visual.trunk.patch_embed.proj.", "vision_model.embeddings.patch_embedding."),
    ("visual.trunk.pos_embed", "vision_model.embeddings.position_embedding.weight"),
    ("visual.trunk.blocks.", "vision_model.encoder.layers."),
    ("visual.trunk.norm.", "vision_model.post_layernorm."),
    ("visual.trunk.attn_pool.latent", "vision_model.head.probe"),
    ("visual.trunk.attn_pool.qkv.", "vision_model.head.attention.in_proj_"),
    ("visual.trunk.attn_pool.proj.", "vision_model.head.attention.out_proj."),
    ("visual.trunk.attn_pool.norm.", "vision_model.head.layernorm."),
    ("visual.trunk.attn_pool.mlp.", "vision_model.head.mlp."),
    ("text.token_embedding.", "text_model.embeddings.token_embedding."),
    ("text.positional_embedding", "text_model.embeddings.position_embedding.weight"),
    ("text.transformer.resblocks.", "text_model.encoder.layers."),
    ("text.ln_final.", "text_model.final_layer_norm."),
    ("text.text_projection.", "text_model.head."),
]
TRANSFORMERS_BLOCK = [
    (".ln_1.", ".layer_norm1."),
    (".ln_2.", ".layer_norm2."),
    (".attn.in_proj_", ".self_attn.qkv."),
    (".attn.out_proj.", ".self_attn.out_proj."),
    (".mlp.c_fc.", ".mlp.fc1."),
    (".mlp.c_proj.", ".mlp.fc2."),
]
TRANSFORMERS_TIMM_BLOCK = [
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
    (".attn.qkv.", ".self_attn.qkv."),
    (".attn.proj.", ".self_attn.out_proj."),
]
# transformers holds the projections of queries, keys and values apart.
ATTENTION = (".self_attn.qkv.", tuple(f".self_attn.{letter}_proj." for letter in "qkv"))
# Its queries come from a learned token, so timm projects them apart from keys and values.
POOL = "visual.trunk.attn_pool."


def from_huggingface(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict from that of CLIPModel or SiglipModel; names that they do not have pass through."""
    siglip = any(name.startswith("text_model.head.") for name in state)
    weights = {name: tensor for name, tensor in state.items() if not name.endswith(".position_ids")}
    theirs = {_rename_for_transformers(name, 1, siglip): tensor for name, tensor in _join(weights, *ATTENTION).items()}
    for name in ("visual.proj", "text_projection"):
        if name in theirs:
            theirs[name] = theirs[name].T
    if siglip and "visual.trunk.pos_embed" in theirs:
        theirs["visual.trunk.pos_embed"] = theirs["visual.trunk.pos_embed"].unsqueeze(0)
    for kind in ("weight", "bias"):
        if (qkv := theirs.pop(f"{POOL}qkv.{kind}", None)) is not None:
            width = len(qkv) // 3
            theirs[f"{POOL}q.{kind}"], theirs[f"{POOL}kv.{kind}"] = qkv[:width], qkv[width:]
    return from_open_clip(theirs)


def to_huggingface(state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """A state dict that transformers loads strictly, from ours: CLIPModel's for `vit` towers, SiglipModel's for `siglip`.

    Args:
        config: of the model; see `huggingface_config` for which ones transformers has.

    Raises:
        ConfigError: transformers has no class for these towers.
    """
    huggingface_config(config)
    siglip = config.image.kind is ImageTower.siglip
    theirs = dict(to_open_clip(state, config))
    for name in ("visual.proj", "text_projection"):
        if name in theirs:
            theirs[name] = theirs[name].T.contiguous()
    if siglip:
        theirs["visual.trunk.pos_embed"] = theirs["visual.trunk.pos_embed"].squeeze(0)
        for kind in ("weight", "bias"):
            halves = [theirs.pop(f"{POOL}{part}.{kind}") for part in ("q", "kv")]
            theirs[f"{POOL}qkv.{kind}"] = torch.cat(halves)
        for name in ("logit_scale", "logit_bias"):
            if name in theirs:
                theirs[name] = theirs[name].reshape(1)
    return _split({_rename_for_transformers(name, 0, siglip): tensor for name, tensor in theirs.items()}, *ATTENTION)


def _rename_for_transformers(name: str, source: int, siglip: bool) -> str:
    """Replace column `source` of the tables above by the other one."""
    target = 1 - source
    for beginning in TRANSFORMERS_SIGLIP if siglip else TRANSFORMERS_CLIP:
        if name.startswith(beginning[source]):
            name = beginning[target] + name.removeprefix(beginning[source])
            for part in TRANSFORMERS_TIMM_BLOCK if beginning[0].startswith("visual.trunk.") else TRANSFORMERS_BLOCK:
                name = name.replace(part[source], part[target])
            break
    return name


def _join(state: dict[str, Tensor], whole: str, parts: tuple[str, ...]) -> dict[str, Tensor]:
    """Projections whose names have one of `parts` as one with `whole` in its name, wherever all of them are there."""
    joined = {}
    for name, tensor in state.items():
        own = next((part for part in parts if part in name), None)
        names = [name.replace(own, part) for part in parts] if own else []
        if own is None or not all(part in state for part in names):
            joined[name] = tensor
        elif own == parts[0]:
            joined[name.replace(own, whole)] = torch.cat([state[part] for part in names])
    return joined


def _split(state: dict[str, Tensor], whole: str, parts: tuple[str, ...]) -> dict[str, Tensor]:
    """The inverse of `_join`."""
    apart: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if whole in name:
            # copies, because files do not take tensors that share memory
            pieces = zip(parts, tensor.chunk(len(parts)), strict=True)
            apart |= {name.replace(whole, part): piece.clone() for part, piece in pieces}
        else:
            apart[name] = tensor
    return apart
