"""From a training configuration to the folder of its run and the processes that train in it: none but this for one device."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from logging import LogRecord
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clip_exp.config.training import TrainConfig
from clip_exp.data.preflight import RunTables
from clip_exp.devices import Devices, resolve_accelerator
from clip_exp.errors import ConfigError
from clip_exp.ranks.environment import started_by_launcher
from clip_exp.ranks.failure import exit_on_signals
from clip_exp.ranks.launch import Opened, Work, launch_work
from clip_exp.runs import RunRecord, lock
from clip_exp.training.messages import logging_to, shown_and_kept
from clip_exp.training.opening import open_run
from clip_exp.training.preflight import check_train, requested_devices

if TYPE_CHECKING:
    from clip_exp.config.compose import Job  # imports Hydra


def launch(config: TrainConfig, arguments: list[str], job: "Job | None") -> int:
    """Check everything, open the run's folder and train in it; return the exit code.

    Args:
        arguments: of the command line, for `run.json`.
        job: of a sweep, or None.
    """
    if started_by_launcher() and job is not None:
        raise ConfigError(
            "a sweep (-m) starts its own processes: run it without torchrun or srun, with trainer.devices."
        )
    with exit_on_signals():
        return train_here(config, arguments, job)[1]


def train_here(config: TrainConfig, arguments: list[str], job: "Job | None" = None) -> tuple[Path, int]:
    """Train in this process, or in those that it starts; the run's folder and the exit code."""
    with shown_and_kept() as messages:
        tables = check_train(config, arguments)
    nodes = config.trainer.num_nodes or 1
    if nodes > 1 and not started_by_launcher():
        per_node = requested_devices(config).requested or "gpu"
        raise ConfigError(
            f"trainer.num_nodes={nodes}: start the command on every node, for example "
            f"torchrun --nnodes={nodes} --nproc-per-node={per_node} --rdzv-endpoint=<first node>:29500 train.py …"
        )
    return launch_work(Training(config, arguments, tables, job, messages))


@dataclass
class Training(Work):
    """A run, in a folder of its own or one of an earlier run that it continues."""

    config: TrainConfig
    arguments: list[str]  # of the command line, for `run.json`
    tables: RunTables
    job: "Job | None"  # of a sweep
    messages: Sequence[LogRecord] = ()  # that were shown while the tables were opened
    resolved: TrainConfig | None = field(default=None, init=False)  # in the process that opened the folder

    def __post_init__(self) -> None:
        self.rank = train_in
        self.timeout_s = self.config.strategy.timeout_s

    @contextmanager
    def open(self) -> Iterator[Opened]:
        """Find the folder to continue in, or make one; see `open_run`."""
        opening = open_run(self.config, self.tables.describe(self.config.data), self.job)
        self.resolved = opening.settled
        folder = opening.folder
        if opening.complete:
            opening.claim()
            print(f"{folder} has finished this run already; resume=never starts another.")
            yield Opened(folder, finished=True)
            return
        with lock(folder):
            opening.begin(self.arguments)
            print(f"run folder: {folder}", flush=True)
            if opening.tasks:
                scored = f"its last checkpoint is scored on {', '.join(opening.tasks)}"
                print(f"The run has finished already: {scored}, nothing is trained.", flush=True)
            yield Opened(folder)

    def devices(self) -> Devices:
        return requested_devices(self.config)

    def device_type(self) -> str:
        return resolve_accelerator(self.config.trainer.accelerator, "trainer.")

    def run(self, folder: Path) -> int:
        return train_in(folder, self.resolved, self.tables, self.messages)

    def note(self, folder: Path, status: str, **facts: Any) -> None:
        record = RunRecord(folder)
        if record.values.get("status") != "finished":  # as it stays where scoring it on further tasks fails
            record.finish(status, **facts)


def train_in(
    folder: Path, config: TrainConfig | None = None, tables: RunTables | None = None, messages: Sequence[LogRecord] = ()
) -> int:
    """Train in a run folder, or score the finished run, as one rank; return the exit code.

    Args:
        config: configuration of the run, where this process has it; None: as the folder's `config.yaml` has it.
        tables: opened tables, where this process has them.
        messages: that were shown while the tables were opened.
    """
    with logging_to(folder, messages):
        from clip_exp.training.fit import train  # imports torch

        return train(folder, config, tables)
