"""Features of images and videos, one vector each, and the search for the highest scores."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from clip_exp.config.evaluation import EvalOnBadImage
from clip_exp.data.loader import report_killed_workers
from clip_exp.devices import exact_float32
from clip_exp.errors import DataError
from clip_exp.evaluation.features import EncodeOptions, ImageEncoder, encode_images, load_batches, require_finite
from clip_exp.inference.inputs import LeftOut
from clip_exp.inference.media import Media
from clip_exp.progress import progress


class EncodedMedia(NamedTuple):
    """Features of the readable images and videos."""

    features: Tensor  # [N, D] float32 of unit norm, on the CPU
    kept: Tensor  # int64 [N], positions of these items, ascending
    left_out: list[LeftOut]


class Encoded(NamedTuple):
    """Item of a `Media` with its features, or with the reason why it cannot be read."""

    item: int
    features: Tensor | None  # float32 [D] of unit norm
    reason: str = ""


def encode_media(encoder: ImageEncoder, media: Media, options: EncodeOptions, what: str | None = None) -> EncodedMedia:
    """Encode images and videos. The features of a video are the normalized mean over its readable frames.

    Args:
        encoder: encoder of images.
        media: images and videos.
        options: options for reading and encoding.
        what: name of the progress bar; None: no progress bar.

    Raises:
        DataError: an image cannot be read and `on_bad_image` is `error`, or none can be read.
    """
    encoded = encode_images(encoder, media, options, what=what)
    owner = torch.from_numpy(media.owner)
    kept, position, frames = torch.unique(owner[encoded.kept], return_inverse=True, return_counts=True)
    features = torch.zeros(len(kept), encoded.features.shape[1]).index_add_(0, position, encoded.features)
    several = frames > 1
    features[several] = F.normalize(features[several], dim=-1)
    missing = sorted(set(range(len(media))) - set(encoded.kept.tolist()))
    reasons = {
        int(media.owner[index]): bad.removeprefix(f"{media.name(index)}: ")
        for index, bad in reversed(list(zip(missing, encoded.bad, strict=True)))
    }
    whole = set(kept.tolist())
    left_out = [
        LeftOut(str(media.paths[item]), reason) for item, reason in sorted(reasons.items()) if item not in whole
    ]
    return EncodedMedia(features, kept, left_out)


def encode_each(
    encoder: ImageEncoder, media: Media, options: EncodeOptions, what: str | None = None
) -> Iterator[Encoded]:
    """Yield every item in order, as soon as it is encoded or found to be unreadable.

    Args:
        encoder: encoder of images.
        media: images and videos.
        options: options for reading and encoding.
        what: name of the progress bar; None: no progress bar.

    Raises:
        DataError: an item cannot be read and `on_bad_image` is `error`.
        NumericError: a feature is not finite.
    """
    entries = range(len(media))
    batches = [list(entries[start : start + options.batch_size]) for start in entries[:: options.batch_size]]
    frames = np.bincount(media.owner)
    waiting: list[tuple[Tensor | None, str]] = []  # frames of the incomplete item
    with report_killed_workers("num_workers"), progress(len(media), what) as advance:
        for batch_entries, batch in zip(batches, load_batches(encoder, media, options, batches), strict=True):
            vectors = encoder.encode(batch.image).cpu() if len(batch.index) else torch.empty(0)
            require_finite(vectors, "image features")
            encoded: dict[int, Tensor] = dict(zip(batch.index.tolist(), vectors, strict=True))
            reasons = iter(batch.bad)
            for entry in batch_entries:
                reason = "" if entry in encoded else next(reasons).reason
                if reason and options.on_bad_image is EvalOnBadImage.error:
                    raise DataError(
                        f"{media.name(entry)}: {reason}. Repair or remove it, or leave such images out: {options.skip_override}."
                    )
                waiting.append((encoded.get(entry), reason))
                item = int(media.owner[entry])
                if len(waiting) == frames[item]:
                    good = [vector for vector, _ in waiting if vector is not None]
                    if len(good) > 1:
                        yield Encoded(item, F.normalize(torch.stack(good).mean(dim=0), dim=-1))
                    else:
                        yield Encoded(item, good[0]) if good else Encoded(item, None, waiting[0][1])
                    waiting = []
            advance(len(batch_entries))


# Search for the highest scores.

ROWS = 1 << 16  # features scored at a time: 128 MB of 512 float32 values


class Match(NamedTuple):
    """Image or video with its score for a query."""

    path: str  # "image <position>" for an image in memory
    score: float  # cosine similarity with the query, -1 to 1
    position: int  # in the given images, or in the index


def best(scores_N: Tensor, top_k: int | None = None) -> Tensor:
    """Return positions of the highest scores, int64 [min(top_k, N)], best first, ties in their order. `top_k` None: all."""
    if top_k is not None and top_k < len(scores_N):
        candidates = (scores_N >= scores_N.topk(top_k).values[-1]).nonzero().flatten()
    else:
        candidates = torch.arange(len(scores_N))
    return candidates[scores_N[candidates].argsort(descending=True, stable=True)][:top_k]


@exact_float32()
def best_matches(features_ND: Tensor, query_D: Tensor, top_k: int | None = None) -> list[tuple[int, float]]:
    """Return the rows with the highest cosine similarity to a query, and the similarities, best first; ties in their order.

    Args:
        features_ND: features of unit norm, possibly mapped from a file, which is read in tiles.
        query_D: features of the query, float32, unit norm.
        top_k: number of rows to return; None: all.

    Raises:
        NumericError: a score is not finite.
    """
    scores_N = torch.cat([tile.float() @ query_D for tile in features_ND.split(ROWS)])
    require_finite(scores_N, "scores")
    return [(row, scores_N[row].item()) for row in best(scores_N, top_k).tolist()]
