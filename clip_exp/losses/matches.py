"""Which pairs of a batch belong together when a caption or a picture occurs twice."""

import torch
from torch import Tensor

from clip_exp.losses.collectives import gather
from clip_exp.ranks.group import rank

ALL = slice(None)


def own_columns(rows: int, device: torch.device) -> Tensor:
    """For each of this rank's rows the column of its own pair in the global batch: int64 [B]."""
    return torch.arange(rows, device=device) + rank() * rows


class Matches:
    """This rank's rows against the columns of the global batch, told by equal ids.

    Args:
        ids: int64 [B] each, of this rank's pairs; a row matches a column where any of them is equal. All ranks construct.
    """

    def __init__(self, ids: list[Tensor]) -> None:
        self._ids = [(ids_B, gather(ids_B)) for ids_B in ids]

    def block(self, rows: slice = ALL, columns: slice = ALL) -> Tensor:
        """bool [rows, columns], the own pair included."""
        return torch.stack([row_B[rows, None] == column_G[None, columns] for row_B, column_G in self._ids]).any(dim=0)


def repeated_matches(
    caption_id_B: Tensor, image_id_B: Tensor, *, same_caption: bool, same_image: bool
) -> Matches | None:
    """The matches of a batch, or None where only the own pair matches.

    Args:
        caption_id_B: int64, equal where captions are equal.
        image_id_B: int64, equal where pictures are equal.
        same_caption: pairs of equal captions match.
        same_image: pairs of equal pictures match.
    """
    chosen = [ids_B for ids_B, use in [(caption_id_B, same_caption), (image_id_B, same_image)] if use]
    return Matches(chosen) if chosen else None
