"""The runs of a campaign: each strategy, with and without workers, averaged weights and steps whose gradient is not finite."""

from dataclasses import dataclass

from clip_exp.config.data import DataConfig
from clip_exp.config.training import TrainConfig
from tests.runs import TINY

STEPS, SAVED_EVERY = 24, 4
# Few parameters, so that a step and a save take milliseconds; dropout and augmentation, so that random states count.
RUN = (
    *(option for option in TINY if not option.startswith(("resume", "data.num_workers", "global_batch_size", "data.generate"))),
    "data.generate.rows=40", "data.generate.val_rows=8", "global_batch_size=8", "data/augmentation=strong",
    "model.embed_dim=16", "model.image.width=32", "model.image.layers=1", "model.image.heads=2", "model.text.width=16",
    "model.text.layers=1", "model.text.heads=2", "model.dropout=0.1",
    f"max_steps={STEPS}", "log_every_n_steps=1", f"checkpoint_every_n_steps={SAVED_EVERY}", "val_every_n_steps=6",
    "callbacks.save_retry_s=0.5",
)  # fmt: skip
# Limits after which a stopped rank or worker ends a run, where the schema has them; long enough for a busy machine
LIMITS = {"hang_timeout_s": 6, "data.timeout_s": 8}
ASYNCHRONOUS = "checkpoint_async"
# Steps with a gradient that is not finite, on one rank: alone, in a row, and next to a checkpoint
NON_FINITE_STEPS = (3, 8, 9, 17)


@dataclass(frozen=True)
class Configuration:
    """A run that faults are injected into."""

    strategy: str
    ranks: int
    workers: int
    averaged: bool = False  # averaged weights, which DeepSpeed does not have
    non_finite: bool = False  # some steps have a gradient that is not finite, on the last rank
    limited: bool = True  # stopped processes end the run in seconds

    @property
    def name(self) -> str:
        name = f"{self.strategy.removeprefix('deepspeed_')} x {self.ranks}, {self.workers} workers"
        return name + (", EMA" if self.averaged else "") + (", NaN" if self.non_finite else "")

    @property
    def overrides(self) -> tuple[str, ...]:
        """Arguments of `train.py`."""
        overrides = [*RUN, f"strategy={self.strategy}", f"data.num_workers={self.workers}"]
        overrides += [f"trainer.devices={self.ranks}"] if self.ranks > 1 else []
        overrides += ["callbacks.ema_decay=0.9"] if self.averaged else []
        overrides += [f"{key}={limit}" for key, limit in LIMITS.items() if self.limited and has_key(key)]
        if has_key(ASYNCHRONOUS):  # every strategy has runs of both kinds
            overrides.append(f"{ASYNCHRONOUS}={str(self.workers == 0).lower()}")
        if self.non_finite:
            steps = ",".join(map(str, NON_FINITE_STEPS))
            target = f"_target_:tests.campaign.inside.NonFiniteGradient,rank:{self.ranks - 1},steps:[{steps}]"
            overrides.append(f"+callbacks.extra.non_finite={{{target}}}")
        return tuple(overrides)


STAGE_2, STAGE_3 = "deepspeed_stage_2", "deepspeed_stage_3"
# Trials take these in turn. The first five hold every promise once; the faster ones come more often.
CONFIGURATIONS = (
    Configuration("auto", 1, 2, averaged=True),
    Configuration("ddp", 2, 2, averaged=True),
    Configuration(STAGE_3, 2, 0),
    Configuration("ddp", 2, 0, averaged=True, non_finite=True),
    Configuration("auto", 1, 0),
    Configuration("ddp", 2, 0),
    Configuration("auto", 1, 2),
    Configuration(STAGE_2, 2, 0),
    Configuration("auto", 1, 0, averaged=True, non_finite=True),
    Configuration("ddp", 2, 0, averaged=True),
    Configuration("auto", 1, 0, averaged=True),
    Configuration(STAGE_3, 2, 2),
    Configuration("ddp", 2, 2),
    Configuration(STAGE_2, 2, 0, non_finite=True),
    Configuration("auto", 1, 0, averaged=True),
    Configuration(STAGE_2, 2, 2),
    Configuration(STAGE_3, 2, 0, non_finite=True),
)
# Key of the schema without which a step that is not finite ends a run
NON_FINITE_NEEDS = "max_skipped_steps"


def has_key(key: str) -> bool:
    """Return True if the schema has this key of training or of its data."""
    group, _, name = key.rpartition(".")
    return name in (DataConfig if group == "data" else TrainConfig).model_fields
