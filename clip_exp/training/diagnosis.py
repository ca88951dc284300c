"""Diagnosis of a run that learns nothing or is validated on its training data: warnings in words, with the key to change.

`data_problems` is about the data, and is known before the first step. `Watch` has the rules for the logged steps, and `Diagnosis` is
the callback that applies them. Each cause is reported once in every start of a run. Steps of warm-up do not count, because features
of random weights are nearly equal, and a single logged step decides nothing.
"""

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from torch import Tensor

from clip_exp.config.base import Target, shown
from clip_exp.config.data import CustomDataConfig, PairLabel
from clip_exp.config.model import TOWERS
from clip_exp.config.training import TrainConfig
from clip_exp.data.datamodule import PairsDataModule
from clip_exp.data.repeats import equal_captions
from clip_exp.devices import exact_float32
from clip_exp.training.metrics import StepMetrics
from clip_exp.training.optim import warmup_length

log = logging.getLogger(__name__)

# A condition is reported if it holds in this many logged steps in a row, over this many optimizer steps.
WINDOW_ROWS = 3
WINDOW_STEPS = 50
CHANCE_TOLERANCE = 1e-3  # distance of the loss from its chance level
# Features count as equal if the mean squared cosine is above the first value (an effective rank of 1.01), and if logits then differ by
# less than about the second one. Features of pretrained models may be in a narrow cone, but their large scale tells them apart.
LARGEST_LIKENESS = 0.99
SMALLEST_SPREAD = 0.1
COMPARED_FEATURES = 256  # features of a batch that are compared
# Fraction of the pairs of a batch whose caption another pair has as well, up to which nothing is reported
MAX_EQUAL_CAPTIONS = 0.1


# ------------------------------------------------------------------------------------------------ before the first step


def data_problems(config: TrainConfig, data: PairsDataModule) -> Iterator[str]:
    """Yield a message if many captions of a batch are equal but count as mismatches, and if training rows are validated on.

    Args:
        config: configuration of the run.
        data: the data of the run, already set up.
    """
    assert data.stream is not None
    # A custom loss is given the ids of the captions instead.
    if config.loss.same_caption is PairLabel.negative and not isinstance(config.loss, Target):
        found = equal_captions(data.stream, config.global_batch_size)
        if found is not None and found.fraction > MAX_EQUAL_CAPTIONS:
            yield (
                f"{100 * found.fraction:.0f} % of the pairs in a batch of {config.global_batch_size:,} have the caption of another pair of the "
                f"batch ({found.sampled:,} sampled captions, {found.distinct:,} distinct). The loss treats these captions as "
                "mismatches, which no model can tell from the match: set loss.same_caption=positive."
            )
    if data.val is None:
        return
    same = min(
        1.0,
        max(
            sum(origin.fraction_in(source.rows.origin) for source in data.stream.sources) for origin in data.val.origins
        ),
    )
    if isinstance(config.data, CustomDataConfig) and isinstance(config.data.val, Target):
        same = max(same, float(config.data.node == config.data.val.node))
    if same > 0:
        where = f"data.val={shown(config.data.val)}" if config.data.val is not None else "data.val"
        yield (
            f"{where}: {math.ceil(100 * same)} % of the validation rows are also training rows, so validation says nothing about other data, and "
            "monitor chooses the checkpoint that has memorized most. Set data.val to other rows, or separate them with a filter: "
            "data.train={path: …, filter: …} and data.filter for data.val."
        )


# ----------------------------------------------------------------------------------------------- rules for logged steps


class LoggedStep(NamedTuple):
    """Values of a logged step that the rules need."""

    step: int
    loss: float  # of the global batch
    logit_scale: float
    lr: float
    # Mean squared cosine between different images, and between different captions, of a batch (`likeness`), by tower
    likeness: Mapping[str, float]


@dataclass
class _Streak:
    """Consecutive logged steps in which a condition held."""

    first: int = 0
    rows: int = 0
    reported: bool = False

    def add(self, step: int, holds: bool) -> bool:
        """Add a logged step; return True if the streak is long enough and was not reported before."""
        if not holds:
            self.rows = 0
            return False
        self.first = self.first if self.rows else step
        self.rows += 1
        long = self.rows >= WINDOW_ROWS and step - self.first >= WINDOW_STEPS
        new, self.reported = long and not self.reported, long or self.reported
        return new


@dataclass(eq=False)
class Watch:
    """Watch over logged steps that returns a message for every new cause of a run that learns nothing."""

    pairs: int  # pairs of the global batch
    chance: float | None  # lowest loss with equal similarities of all pairs; None: not known
    warmup: int  # steps that do not count
    towers: tuple[str, ...]  # towers whose features are trained
    _chance: _Streak = field(default_factory=_Streak, init=False)
    _equal: dict[str, _Streak] = field(default_factory=dict, init=False)

    def add(self, seen: LoggedStep) -> Iterator[str]:
        """Add a logged step, and yield the messages for the user."""
        if seen.step <= self.warmup:
            return
        rate = f"the rate is now {seen.lr:.2g}"
        stuck = self.chance is not None and abs(seen.loss - self.chance) < CHANCE_TOLERANCE
        if self._chance.add(seen.step, stuck):
            yield (
                f"The loss has been {self.chance:.4f} since step {self._chance.first:,}. This is the chance level: the loss of a model "
                f"that gives all {self.pairs:,} pairs of a batch the same similarity, so it learns nothing. Usually optimizer.lr is too "
                f"high: lower it ({rate}), or raise it if it is below 1e-5. Otherwise the captions do not belong to their images: check "
                "data.image_key and data.caption_key with clip-exp check-data."
            )
        equal = [tower for tower in self.towers if self._equal_features(tower, seen)]
        if equal:
            since = max(self._equal[tower].first for tower in equal)
            which = " and all ".join({"image": "images", "text": "captions"}[tower] for tower in equal)
            values = " and ".join(f"{seen.likeness[tower]:.4f}" for tower in equal)
            yield (
                f"All {which} of a batch have had nearly the same feature since step {since:,}: the mean squared "
                f"cosine between different ones is {values}. Usually optimizer.lr is too high ({rate}): lower it, or increase "
                f"scheduler.warmup_steps (now {self.warmup:,})."
            )

    def _equal_features(self, tower: str, seen: LoggedStep) -> bool:
        likeness = seen.likeness.get(tower, math.nan)
        # Logits of features with a cosine c differ by about scale * (1 - c), and 1 - c is about half of 1 - c².
        equal = likeness > LARGEST_LIKENESS and seen.logit_scale * (1 - likeness) / 2 < SMALLEST_SPREAD
        return self._equal.setdefault(tower, _Streak()).add(seen.step, equal)


@torch.no_grad()
@exact_float32()
def likeness(features_BD: Tensor, id_B: Tensor) -> Tensor:
    """Return the mean squared cosine between the features of different images or texts, a scalar; NaN if all are the same one.

    Its inverse is the effective rank of many features (their participation ratio): 1 if all are the same up to their sign.

    Args:
        features_BD: features with unit norm.
        id_B: int64, equal for equal images or texts.
    """
    rows_BD, id_B = features_BD[:COMPARED_FEATURES].float(), id_B[:COMPARED_FEATURES]
    differ_BB = id_B[:, None] != id_B[None, :]
    return ((rows_BD @ rows_BD.T).square() * differ_BB).sum() / differ_BB.sum()


# ------------------------------------------------------------------------------------------------------------- callback


@dataclass(eq=False, repr=False)
class Diagnosis(pl.Callback):
    """Callback that logs a warning for each cause found by `Watch`. Rank 0 compares the features of its own pairs.

    It acts at logged steps only, after `StepMetrics`, which waits for the GPU there anyway.
    """

    config: TrainConfig
    metrics: StepMetrics  # measures the steps
    watch: Watch | None = field(default=None, init=False)

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        pairs, frozen = self.config.global_batch_size, self.config.finetune.freeze_towers_steps
        self.watch = Watch(
            pairs,
            self.config.loss.chance_level(pairs) if pairs > 1 else None,
            frozen + warmup_length(self.config.scheduler, pl_module.total_steps - frozen),
            watched_towers(pl_module),
        )

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        row, step = self.metrics.latest, trainer.global_step
        if self.watch is None or row.get("samples_seen") != step * self.metrics.global_batch_size:
            return
        found = [likeness(*pl_module.last_features[tower]) for tower in self.watch.towers]
        values = torch.stack(found).tolist() if found else []
        seen = LoggedStep(
            step,
            row.get("train/loss", math.nan),  # missing if the step was skipped
            row.get("train/logit_scale", math.nan),
            row["train/lr"],
            dict(zip(self.watch.towers, values, strict=True)),
        )
        for message in self.watch.add(seen):
            log.warning(message)


def watched_towers(pl_module: Any) -> tuple[str, ...]:
    """Return the towers that have trained weights, and whose features the loss takes."""
    taken = getattr(pl_module.loss, "towers", TOWERS)
    return tuple(
        tower
        for tower in TOWERS
        if tower in taken and any(weight.requires_grad for weight in getattr(pl_module.model, tower).parameters())
    )
