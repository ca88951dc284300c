"""Which pairs of a batch belong together when a caption or a picture occurs twice."""

import torch
from torch import Tensor

from clip_exp.losses.collectives import gather
from clip_exp.ranks.group import rank, world_size


def own_columns(rows: int, device: torch.device) -> Tensor:
    """For each of this rank's rows the column of its own pair in the global batch: int64 [B]."""
    return torch.arange(rows, device=device) + rank() * rows


def repeated_matches(
    caption_id_B: Tensor, image_id_B: Tensor, *, same_caption: bool, same_image: bool
) -> Tensor | None:
    """This rank's rows against the columns of the global batch.

    Args:
        caption_id_B: int64, equal where captions are equal.
        image_id_B: int64, equal where pictures are equal.
        same_caption: pairs of equal captions match.
        same_image: pairs of equal pictures match.

    Returns:
        bool [B, W * B], the own pair included; None where only the own pair matches.
    """
    chosen = [ids_B for ids_B, use in [(caption_id_B, same_caption), (image_id_B, same_image)] if use]
    if not chosen:
        return None
    return torch.stack([ids_B[:, None] == gather(ids_B)[None, :] for ids_B in chosen]).any(dim=0)


def own_matches(rows: int, device: torch.device) -> Tensor:
    """As `repeated_matches`, where only the own pair matches."""
    columns_G = torch.arange(rows * world_size(), device=device)
    return own_columns(rows, device)[:, None] == columns_G[None, :]
