"""Heartbeat of a training run: the callback that reports what the training thread does, and how long each phase may be silent.

a step             hang_timeout_s, or 20 times the usual step, or 1.25 times data.timeout_s, whichever is longest
reading a row      data.timeout_s
everything else    12 times hang_timeout_s: the start, the first step, compiled steps, validation, tasks, saving, the end
"""

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from clip_exp.config.training import TrainConfig
from clip_exp.progress import in_notebook
from clip_exp.ranks import heartbeat
from clip_exp.ranks.environment import outer_placement
from clip_exp.ranks.failure import watched_by_launcher
from clip_exp.ranks.heartbeat import Heartbeat, Phase
from clip_exp.ranks.watchdog import guarded
from clip_exp.training.launch import note

STEPS = 50  # last steps, whose times give the limit of the next one
USUAL = 20  # times the usual step
OVER_DATA = 1.25  # times data.timeout_s: other ranks wait in their step for one that waits for its data
OF_A_STEP = (Phase.data, Phase.forward, Phase.backward, Phase.update)


@contextmanager
def living(config: TrainConfig, run_dir: Path) -> Iterator[None]:
    """Give this process a heartbeat inside the context, and a watchdog unless clip_exp's launcher watches it."""
    if config.hang_timeout_s is None:
        yield
        return
    placement = outer_placement()
    rank = 0 if placement is None else placement.rank
    own = Heartbeat(run_dir, rank, config.hang_timeout_s, config.data.timeout_s)
    # Writing the last checkpoint is retried.
    own.limits[Phase.saving] += config.callbacks.save_retry_s
    with heartbeat.beating(own):
        # A notebook's process is not only this run's, and its user can interrupt a cell.
        if watched_by_launcher() or in_notebook():
            yield
        else:
            with guarded(own, run_dir, placement, note):
                yield


class Liveness(pl.Callback):
    """Callback that enters the phases of a run in its heartbeat. It must be the first, so that it knows the work of the others."""

    def __init__(self, config: TrainConfig) -> None:
        self.hang_timeout_s = config.hang_timeout_s
        self.least_s = max(config.hang_timeout_s or 0.0, OVER_DATA * (config.data.timeout_s or 0.0))
        # With a new length of text, any step may compile.
        self.compiles = config.compile
        self.times: deque[float] = deque(maxlen=STEPS)

    def before(self, phase: Phase, then: Callable[[], None]) -> Callable[[], None]:
        """Return a function that enters a phase and calls `then`."""

        def enter() -> None:
            heartbeat.enter(phase)
            then()

        return enter

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        trainer.datamodule.on_wait = lambda: heartbeat.enter(Phase.data, trainer.global_step + 1)  # type: ignore[attr-defined]

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._began_s = time.monotonic()
        heartbeat.enter(Phase.forward, trainer.global_step + 1)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: Any, loss: Any) -> None:
        heartbeat.enter(Phase.backward)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: Any) -> None:
        heartbeat.enter(Phase.update)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.times.append(time.monotonic() - self._began_s)
        if not self.compiles:
            heartbeat.limit(dict.fromkeys(OF_A_STEP, self.limit_s))
        heartbeat.enter(Phase.update)

    @property
    def limit_s(self) -> float:
        """Limit of a step."""
        # The mean as well: a process that is ahead of its GPU waits for many steps in one.
        return max(self.least_s, USUAL * max(statistics.median(self.times), statistics.fmean(self.times)))

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        heartbeat.enter(Phase.validation)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        heartbeat.enter(Phase.validation)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        heartbeat.enter(Phase.end)
