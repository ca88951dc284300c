"""Between our parameter names and those of transformers' CLIPModel and SiglipModel.

The way leads through open_clip's names, which the same towers have there. What differs from those are names, the projections of
queries, keys and values, which transformers holds apart, and axes of length one.
"""

import torch
from torch import Tensor

from clip_exp.config.model_schema import ImageTower, ModelConfig
from clip_exp.weights.huggingface_config import huggingface_config, model_config_of
from clip_exp.weights.open_clip import from_open_clip, to_open_clip

__all__ = ["from_huggingface", "huggingface_config", "is_huggingface", "model_config_of", "to_huggingface"]

# (open_clip's, transformers'): the first beginning that fits is replaced, then the parts of a block.
CLIP = [
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
SIGLIP = [
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
BLOCK = [
    (".ln_1.", ".layer_norm1."),
    (".ln_2.", ".layer_norm2."),
    (".attn.in_proj_", ".self_attn.qkv."),
    (".attn.out_proj.", ".self_attn.out_proj."),
    (".mlp.c_fc.", ".mlp.fc1."),
    (".mlp.c_proj.", ".mlp.fc2."),
]
TIMM_BLOCK = [
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
    (".attn.qkv.", ".self_attn.qkv."),
    (".attn.proj.", ".self_attn.out_proj."),
]
FUSED, APART = ".self_attn.qkv.", [f".self_attn.{letter}_proj." for letter in "qkv"]
POOL = (
    "visual.trunk.attn_pool."  # its queries come from a learned token, so timm projects them apart from keys and values
)


def is_huggingface(state: dict[str, Tensor]) -> bool:
    """Whether the names are those of transformers' CLIPModel or SiglipModel."""
    return any(name.startswith("vision_model.") for name in state) and any(
        name.startswith("text_model.") for name in state
    )


def from_huggingface(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict from that of CLIPModel or SiglipModel; names that they do not have pass through."""
    siglip = any(name.startswith("text_model.head.") for name in state)
    weights = {name: tensor for name, tensor in state.items() if not name.endswith(".position_ids")}
    theirs = {_rename(name, 1, siglip): tensor for name, tensor in _fuse(weights).items()}
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
    return _split({_rename(name, 0, siglip): tensor for name, tensor in theirs.items()})


def _rename(name: str, source: int, siglip: bool) -> str:
    """Replace column `source` of the tables above by the other one."""
    target = 1 - source
    for beginning in SIGLIP if siglip else CLIP:
        if name.startswith(beginning[source]):
            name = beginning[target] + name.removeprefix(beginning[source])
            for part in TIMM_BLOCK if beginning[0].startswith("visual.trunk.") else BLOCK:
                name = name.replace(part[source], part[target])
            break
    return name


def _fuse(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Projections of queries, keys and values as one, wherever all three are there."""
    fused = {}
    for name, tensor in state.items():
        own = next((part for part in APART if part in name), None)
        names = [name.replace(own, part) for part in APART] if own else []
        if own is None or not all(part in state for part in names):
            fused[name] = tensor
        elif own == APART[0]:
            fused[name.replace(own, FUSED)] = torch.cat([state[part] for part in names])
    return fused


def _split(state: dict[str, Tensor]) -> dict[str, Tensor]:
    apart: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if FUSED in name:
            # copies, because files do not take tensors that share memory
            apart |= {
                name.replace(FUSED, part): third.clone() for part, third in zip(APART, tensor.chunk(3), strict=True)
            }
        else:
            apart[name] = tensor
    return apart
