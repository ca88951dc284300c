"""From an evaluation's configuration to its folder and the processes that work in it: none but this for one device."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clip_exp.config.evaluation_schema import EvaluateConfig
from clip_exp.config.load import read_evaluate_config
from clip_exp.devices import Devices, parse_devices, resolve_accelerator
from clip_exp.errors import PREEMPTED_EXIT_CODE
from clip_exp.evaluation.prepared import Task
from clip_exp.evaluation.run import check, evaluate_in, open_folder
from clip_exp.inference.sources import Source
from clip_exp.ranks.environment import outer_ranks
from clip_exp.ranks.launch import Opened, Work, launch_work
from clip_exp.ranks.signals import Stopped
from clip_exp.runs import RunRecord

TIMEOUT_S = 7200  # of a collective: a rank waits this long for the slowest


def launch(config: EvaluateConfig, arguments: list[str]) -> int:
    """Check everything, open the evaluation's folder and evaluate in it; return the exit code.

    Args:
        arguments: of the command line, for `run.json`.
    """
    return launch_work(Evaluation(config, arguments))[1]


class Evaluation(Work):
    """An evaluation, in a new folder."""

    def __init__(self, config: EvaluateConfig, arguments: list[str]) -> None:
        self.config = config
        self.arguments = arguments
        self.checked: tuple[Source, list[Task]] | None = None  # of the process that opened the folder
        self.rank = evaluate_rank
        self.timeout_s = TIMEOUT_S

    @contextmanager
    def open(self) -> Iterator[Opened]:
        """Find the model and the data, see that there are the devices, and make the folder."""
        self.checked = source, _ = check(self.config)
        if not outer_ranks():  # which choose the devices
            self.devices().check_gpus()
        yield Opened(open_folder(self.config, source, self.arguments))

    def devices(self) -> Devices:
        return parse_devices(self.config.accelerator, self.config.devices)

    def device_type(self) -> str:
        return resolve_accelerator(self.config.accelerator)

    def run(self, folder: Path) -> int:
        source, tasks = self.checked or _check_again(self.config)
        return _evaluate(folder, self.config, source, tasks)

    def note(self, folder: Path, status: str, **facts: Any) -> None:
        RunRecord(folder).finish(status, **facts)


def evaluate_rank(folder: Path) -> int:
    """Evaluate what an evaluation folder's `config.yaml` describes, as one rank of several; return the exit code."""
    from clip_exp.ranks import group  # imports torch

    config = read_evaluate_config(folder)
    group.start(resolve_accelerator(config.accelerator), TIMEOUT_S)
    return _evaluate(folder, config, *_check_again(config))


def _evaluate(folder: Path, config: EvaluateConfig, source: Source, tasks: list[Task]) -> int:
    """Evaluate, and say how to continue where a signal stopped it; return the exit code."""
    try:
        evaluate_in(folder, config, source, tasks)
    except Stopped as stopped:
        if _is_first_rank():
            how = (
                "goes on from the features that are kept"
                if config.cache_gb
                else "starts over, since cache_gb=0 keeps nothing"
            )
            print(f"{stopped} The same command {how}.", file=sys.stderr, flush=True)
        return PREEMPTED_EXIT_CODE
    return 0


def _check_again(config: EvaluateConfig) -> tuple[Source, list[Task]]:
    """Repeat `check` in a rank; its warnings were logged where it was first done, and from here on only rank 0 warns."""
    root = logging.getLogger()
    root.setLevel(logging.ERROR)
    checked = check(config)
    root.setLevel(logging.WARNING if _is_first_rank() else logging.ERROR)
    return checked


def _is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"
