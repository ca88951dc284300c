"""Start of a training run: check the configuration, open the run folder, and start the processes (one device needs only this one)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from logging import LogRecord
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clip_exp.config.training import TrainConfig
from clip_exp.data.preflight import RunTables
from clip_exp.devices import Devices, resolve_accelerator
from clip_exp.errors import ClipExpError, ConfigError
from clip_exp.ranks.environment import started_by_launcher
from clip_exp.ranks.failure import exit_on_signals
from clip_exp.ranks.launch import Opened, Work, clear, launch_work
from clip_exp.runs import RunRecord, lock
from clip_exp.training.messages import buffered_logging, logging_to
from clip_exp.training.opening import open_run
from clip_exp.training.preflight import check_train, requested_devices

if TYPE_CHECKING:
    from clip_exp.config.jobs import Job  # imports Hydra


def launch(config: TrainConfig, arguments: list[str], job: "Job | None") -> int:
    """Check the configuration and the data, open the run folder and train in it; return the exit code.

    Args:
        config: configuration of the run.
        arguments: command line arguments, for `run.json`.
        job: job of a sweep, or None.
    """
    if started_by_launcher() and job is not None:
        raise ConfigError(
            "a sweep (-m) starts its own processes: run it without torchrun or srun, with trainer.devices."
        )
    with exit_on_signals():
        return train_here(config, arguments, job)[1]


def train_here(config: TrainConfig, arguments: list[str], job: "Job | None" = None) -> tuple[Path, int]:
    """Train in this process, or in processes that it starts; return the run folder and the exit code."""
    with buffered_logging() as messages:
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
    """Training run, in a new folder or in that of an earlier run that it resumes."""

    config: TrainConfig
    arguments: list[str]  # command line arguments, for `run.json`
    tables: RunTables
    job: "Job | None"  # job of a sweep
    messages: Sequence[LogRecord] = ()  # records shown while the tables were opened
    resolved: TrainConfig | None = field(default=None, init=False)  # set in the process that opened the folder

    def __post_init__(self) -> None:
        self.rank = train_in
        self.timeout_s = self.config.strategy.timeout_s

    @contextmanager
    def open(self) -> Iterator[Opened]:
        """Find the run folder to resume, or create one; see `open_run`."""
        opening = open_run(self.config, self.tables.describe(self.config.data), self.job)
        self.resolved = opening.resolved
        folder = opening.folder
        if opening.complete:
            opening.claim()
            with suppress(ClipExpError), lock(folder):  # it may have been killed after its report
                clear(folder)
            print(f"{folder}: this run is already finished. Set resume=never to start another.")
            yield Opened(folder, finished=True)
            return
        with lock(folder):
            opening.begin(self.arguments)
            print(f"run folder: {folder}", flush=True)
            if opening.tasks:
                names = ", ".join(opening.tasks)
                print(
                    f"The run is already finished: scoring its last checkpoint on {names}, without training.",
                    flush=True,
                )
            yield Opened(folder)

    def devices(self) -> Devices:
        return requested_devices(self.config)

    def device_type(self) -> str:
        return resolve_accelerator(self.config.trainer.accelerator, "trainer.")

    def run(self, folder: Path) -> int:
        return train_in(folder, self.resolved, self.tables, self.messages)

    def note(self, folder: Path, status: str, **facts: Any) -> None:
        note(folder, status, **facts)


def note(folder: Path, status: str, **facts: Any) -> None:
    """Record in `run.json` that a run has failed or was preempted."""
    record = RunRecord(folder)
    if record.values.get("status") != "finished":  # a failure to score further tasks does not undo that
        record.finish(status, **facts)


def train_in(
    folder: Path, config: TrainConfig | None = None, tables: RunTables | None = None, messages: Sequence[LogRecord] = ()
) -> int:
    """Train in a run folder, or score the finished run, as one rank; return the exit code.

    Args:
        folder: the run folder.
        config: configuration of the run; None: read from `config.yaml` in the folder.
        tables: the run's tables if this process has opened them.
        messages: records shown while the tables were opened.
    """
    with logging_to(folder, messages):
        from clip_exp.training.fit import train  # imports torch

        return train(folder, config, tables)
