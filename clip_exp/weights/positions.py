"""Positional embeddings of another number of positions: a grid of patches is interpolated, a text's beginning is kept."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

ENDINGS = ("positional_embedding", "pos_embed")  # ours and open_clip's, and timm's
TEXT = "text.positional_embedding"


def fit_positions(
    state: dict[str, Tensor], own: dict[str, Tensor], causal_text: bool
) -> tuple[dict[str, Tensor], list[str]]:
    """The state with positional embeddings of the model's shapes, wherever only the number of positions differs.

    Args:
        state: of the file, under our names.
        own: the model's state dict.
        causal_text: a token of the text tower sees only what stands before it, and the text is pooled at its end. Then
            fewer positions are exact, for texts that fit in. More are never made up: they would need training.

    Returns:
        A new dictionary, and a sentence about each change.
    """
    fitted, notes = dict(state), []
    for name in sorted(own.keys() & state.keys()):
        old, new = state[name], own[name]
        if (
            not name.endswith(ENDINGS)
            or old.shape == new.shape
            or old.ndim != new.ndim
            or old.shape[-1] != new.shape[-1]
            or not old.is_floating_point()
        ):
            continue
        before, after = old.shape[-2], new.shape[-2]
        if name == TEXT:
            if causal_text and after < before:
                fitted[name] = old[:after]
                notes.append(
                    f"{name}: the first {after} of the file's {before} positions, for texts of at most {after} tokens."
                )
        elif name.startswith("image.") and (resized := resize_grid(old, after)) is not None:
            fitted[name] = resized
            sides = [f"{side}x{side}" for side in (math.isqrt(before), math.isqrt(after))]
            notes.append(
                f"{name}: the file's grid of {sides[0]} patches is interpolated to {sides[1]} (bicubic), as the image size differs."
            )
    return fitted, notes


def resize_grid(positions_ND: Tensor, count: int) -> Tensor | None:
    """Positions of a square grid of patches, interpolated to another one as open_clip and timm do (bicubic, antialiased).

    Args:
        positions_ND: [N, D] or [1, N, D], row by row; N is a square, or one more with a class token first, which is kept.
        count: of positions wanted, with the same kind of first token.

    Returns:
        float32 [count, D] or [1, count, D]; None where N and `count` are not both such numbers.
    """
    extra = positions_ND.shape[-2] - math.isqrt(positions_ND.shape[-2]) ** 2
    side = math.isqrt(max(count - extra, 0))
    if extra > 1 or side == 0 or side**2 + extra != count:
        return None
    first_ED, grid_ND = positions_ND.float().flatten(0, -2).split([extra, positions_ND.shape[-2] - extra])
    before = math.isqrt(len(grid_ND))
    grid_1DHW = grid_ND.T.unflatten(1, (before, before)).unsqueeze(0)
    grid_1DHW = F.interpolate(grid_1DHW, size=(side, side), mode="bicubic", antialias=True, align_corners=False)
    resized_ND = torch.cat([first_ED, grid_1DHW[0].flatten(1).T])
    return resized_ND.reshape(*positions_ND.shape[:-2], count, -1)
