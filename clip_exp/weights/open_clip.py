"""Between our parameter names and those of `open_clip.CLIP` with a Vision Transformer.

The class is also the layout of OpenAI's checkpoints. Both ways give the same numbers; only names and shapes differ.
"""

import math

from torch import Tensor

# (ours, theirs): the first beginning that fits is replaced, then every part.
BEGINNINGS = [
    ("image.patch_embedding.", "visual.conv1."),
    ("image.projection.weight", "visual.proj"),
    ("image.", "visual."),
    ("text.projection.weight", "text_projection"),
    ("text.token_embedding.", "token_embedding."),
    ("text.positional_embedding", "positional_embedding"),
    ("text.transformer.", "transformer."),
    ("text.ln_final.", "ln_final."),
]
PARTS = [
    (".blocks.", ".resblocks."),
    (".attention.qkv.", ".attn.in_proj_"),
    (".attention.out.", ".attn.out_proj."),
    (".mlp.fc.", ".mlp.c_fc."),
    (".mlp.proj.", ".mlp.c_proj."),
]
# Stored in some files, but no weights: OpenAI's three numbers, and the causal mask of early open_clip.
NOT_WEIGHTS = {"input_resolution", "context_length", "vocab_size", "attn_mask"}


def _rename(key: str, source: int, target: int) -> str:
    """Replace column `source` of the tables above by column `target`."""
    for names in BEGINNINGS:
        if key.startswith(names[source]):
            key = names[target] + key.removeprefix(names[source])
            break
    for names in PARTS:
        key = key.replace(names[source], names[target])
    return key


def is_open_clip(state: dict[str, Tensor]) -> bool:
    """Whether the names are those of `open_clip.CLIP` with a Vision Transformer, `module.` before them or not."""
    return bool({"visual.conv1.weight", "module.visual.conv1.weight"} & state.keys())


def to_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict that `open_clip.CLIP` loads strictly, from ours. Tensors are shared where the shape allows."""
    theirs = {}
    for key, tensor in state.items():
        if key == "image.patch_embedding.weight":
            side = math.isqrt(tensor.shape[1] // 3)
            tensor = tensor.unflatten(1, (3, side, side))
        elif key in ("image.projection.weight", "text.projection.weight"):
            tensor = tensor.T.contiguous()
        elif key in ("logit_scale", "logit_bias"):
            tensor = tensor.squeeze(0)
        theirs[_rename(key, 0, 1)] = tensor
    return theirs


def from_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict from that of `open_clip.CLIP`; names that it does not know pass through.

    Args:
        state: names may begin with `module.`, as DistributedDataParallel leaves them.
    """
    ours = {}
    for key, tensor in state.items():
        key = key.removeprefix("module.")
        if key in NOT_WEIGHTS:
            continue
        if key == "visual.conv1.weight":
            tensor = tensor.flatten(1)
        elif key in ("visual.proj", "text_projection"):
            tensor = tensor.T.contiguous()
        elif key in ("logit_scale", "logit_bias"):
            tensor = tensor.reshape(1)
        ours[_rename(key, 1, 0)] = tensor
    return ours
