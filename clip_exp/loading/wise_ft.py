"""Between a fine-tuned run and what it started from, weight by weight (Wortsman et al. 2022, WiSE-FT). Without torch."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from clip_exp.errors import CheckpointError, ConfigError
from clip_exp.runs import read_record
from clip_exp.weights.find import hash_part, hash_weights

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Mix:
    """How much of a run's weights is taken, the rest from its start."""

    share: float  # 0: the start, 1: the run
    start: str  # file or folder of its weights
    start_sha256: str
    prefix: str | None = None  # `pretrained_prefix` of the run

    def sha256(self, weights_sha256: str) -> str:
        """A hash that stands for the mixture, from that of the run's weights."""
        start = hash_part(self.start_sha256, self.prefix)
        return hashlib.sha256(f"{weights_sha256} {start} {self.share!r}".encode()).hexdigest()

    def check(self) -> None:
        """See that the start is what it was.

        Raises:
            CheckpointError: it is no longer there, or others' weights are.
        """
        where = f"wise_ft={self.share:g}: {self.start}, which the run started from,"
        if not Path(self.start).exists():
            raise CheckpointError(f"{where} is no longer there: put it back, or leave wise_ft out.")
        if hash_weights(Path(self.start)) != self.start_sha256:
            raise CheckpointError(f"{where} holds other weights now: its sha256 was {self.start_sha256}.")


def mix_of(run_dir: Path, share: float) -> Mix:
    """The weights that a run started from, as its `run.json` tells, found and checked.

    Raises:
        ConfigError: the share is not in 0..1, or the run did not start from weights.
        CheckpointError: they are no longer there, or others.
    """
    if not 0 <= share <= 1:
        raise ConfigError(f"wise_ft={share:g} must be a share of the run's weights, from 0 to 1.")
    record = read_record(run_dir)
    if towers := sorted({"pretrained_image", "pretrained_text"} & record.keys()):
        raise ConfigError(
            f"wise_ft={share:g} goes between a run and weights of the whole model, and {run_dir} started from {' and '.join(towers)}. "
            "Leave wise_ft out."
        )
    start = record.get("pretrained")
    if not isinstance(start, dict):
        raise ConfigError(
            f"wise_ft={share:g} goes between a run and the weights that it started from, and {run_dir} started from none: "
            "its run.json has no `pretrained`. Leave wise_ft out."
        )
    mix = Mix(share, start["path"], start["sha256"], start.get("prefix"))
    mix.check()
    return mix


def interpolate(start: "Mapping[str, Tensor]", tuned: "Mapping[str, Tensor]", share: float) -> "dict[str, Tensor]":
    """(1 - share) * start + share * tuned of every tensor of two state dicts with the same names; integers are the tuned ones'."""
    return {
        name: (1 - share) * start[name] + share * value if value.is_floating_point() else value
        for name, value in tuned.items()
    }
