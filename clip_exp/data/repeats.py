"""Repeated data that a run should report before it trains: equal captions within a batch. Does not import torch.

The captions are those of the run's own first batches, so sources, weights, filters and the shuffle count as in training.
"""

from collections import Counter
from typing import NamedTuple

from clip_exp.data.stream import Stream

SAMPLED = 4096  # captions that are compared: 0.2 s, whatever the size of the table


class EqualCaptions(NamedTuple):
    """Equal captions in the first batches of a run."""

    fraction: float  # of the pairs, those whose caption another pair of the same batch has as well
    distinct: int  # distinct captions of all these batches
    sampled: int  # captions of all these batches


def equal_captions(stream: Stream, batch_size: int) -> EqualCaptions | None:
    """Compare the captions of the first batches of an epoch; return None if captions are known only after reading the images.

    Args:
        stream: the training data.
        batch_size: pairs of a batch over all devices. Of a batch of more than `SAMPLED` pairs only the first ones are compared, so
            the fraction is a lower bound.
    """
    rows = min(batch_size, SAMPLED, len(stream))
    # No batch that spans two epochs, which may have the same pair twice.
    batches = max(1, min(SAMPLED, len(stream)) // rows)
    every = Counter[str]()
    repeated = 0
    for batch in range(batches):
        captions = Counter[str]()
        for position in range(batch * batch_size, batch * batch_size + rows):
            sample = stream[position]
            caption = sample.source.caption(sample.epoch, sample.row)
            if caption is None:
                return None
            captions[caption] += 1
        repeated += sum(count for count in captions.values() if count > 1)
        every += captions
    return EqualCaptions(repeated / (batches * rows), len(every), every.total())
