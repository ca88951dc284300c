"""What is measured around the steps of a run, by a clock of the test's own, and on pretended GPUs and ranks."""

import json
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import clip_exp
from clip_exp.checkpoints.io import SafeCheckpointIO
from clip_exp.data import datamodule, loader
from clip_exp.data.loader import Collate
from clip_exp.runs import read_metrics
from clip_exp.training import metrics, summary
from clip_exp.training.callbacks import AveragedWeights, Checkpointer
from clip_exp.training.metrics import MetricsCSV, StepMetrics, of_slowest_loader
from clip_exp.training.module import CLIPModule
from clip_exp.training.tasks import TaskScores
from clip_exp.training.timing import StepClock, StepTimes
from tests.runs import TINY, unfinish


@dataclass
class Clock:
    """A time that passes in the functions that are made to take some, and nowhere else."""

    monkeypatch: pytest.MonkeyPatch
    now_s: float = 0.0

    def now(self) -> float:
        return self.now_s

    def slow(self, owner: Any, name: str, seconds: float, instead: Callable[..., Any] | None = None) -> None:
        """Let a function take so long."""
        function = instead or getattr(owner, name)

        def slowed(*arguments: Any, **named: Any) -> Any:
            self.now_s += seconds
            return function(*arguments, **named)

        self.monkeypatch.setattr(owner, name, slowed)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """In a run, a batch takes 0.5 s to load, a step 1 s, an update of averaged weights 0.25 s, and all else hours."""
    clock = Clock(monkeypatch)
    monkeypatch.setattr(metrics, "step_clock", lambda _, waited_s: StepClock(waited_s, clock.now))
    monkeypatch.setattr(datamodule, "time", SimpleNamespace(perf_counter=clock.now))
    clock.slow(Collate, "__call__", 0.5)
    clock.slow(CLIPModule, "training_step", 1.0)
    clock.slow(AveragedWeights, "on_train_batch_end", 0.25)
    clock.slow(CLIPModule, "on_validation_model_zero_grad", 4000.0)  # comes before any hook of validation's
    clock.slow(CLIPModule, "validation_step", 5000.0)
    clock.slow(SafeCheckpointIO, "save_checkpoint", 6000.0)
    clock.slow(Checkpointer, "_prune", 7000.0)
    clock.slow(TaskScores, "_score", 8000.0, instead=lambda *_: {})
    monkeypatch.setattr(summary, "write_report", lambda run_dir: run_dir / "report.html")
    return clock


@pytest.mark.usefixtures("clock")
def test_the_logged_rate_is_the_wall_clocks_without_validation_saving_and_scoring(tmp_path: Path) -> None:
    arguments = [
        *(word for word in TINY if word != "resume=never"), "max_steps=8", "log_every_n_steps=1", "val_every_n_steps=4",
        "checkpoint_every_n_steps=5", "task=digits", "task_every_n_steps=3", "callbacks.ema_decay=0.9",
        "callbacks.progress=none", f"output_dir={tmp_path}",
    ]  # fmt: skip
    run = clip_exp.train(*arguments)
    rows = read_metrics(run / "metrics.csv")
    assert [row["data_wait_s"] for row in rows] == [*[0.5] * 7, 0.0], "the last step finds its batch there"
    assert [row["compute_s"] for row in rows] == [1.0] * 8
    step_s = [1.5, *[1.75] * 6, 1.25]  # the weights are averaged after a step is measured
    assert [16 / row["samples_per_s"] for row in rows] == pytest.approx(step_s)
    written = json.loads((run / "summary.json").read_text())
    assert written["data_wait_share"] == pytest.approx(6 * 0.5 / sum(step_s[1:]))

    shutil.rmtree(run / "checkpoints" / "step-000008")
    unfinish(run)
    assert clip_exp.train(*arguments) == run
    rows = read_metrics(run / "metrics.csv")
    assert [16 / row["samples_per_s"] for row in rows[5:]] == pytest.approx([1.5, 1.75, 1.25])


def a_trainer(device: str = "cpu", others: tuple[StepTimes, ...] = ()) -> Any:
    """What is asked of a Trainer; `others`: times of the ranks after this one."""

    def all_gather(own: torch.Tensor) -> torch.Tensor:
        rows = [torch.tensor([other.waited_s, other.computed_s, other.wall_s], dtype=own.dtype) for other in others]
        return torch.stack([own, *rows])

    data = SimpleNamespace(
        data_wait_s=0.0,
        on_train_batch=None,
        config=SimpleNamespace(num_workers=None),
        preprocessing=SimpleNamespace(size=224),
    )
    strategy = SimpleNamespace(root_device=torch.device(device), all_gather=all_gather)
    return SimpleNamespace(datamodule=data, strategy=strategy)


def test_a_row_has_the_times_of_the_rank_that_waited_longest() -> None:
    """Where it is waited for counts as computing on the others."""
    slowest, other = StepTimes(5, 3.0, 2.0, 6.0), StepTimes(5, 0.5, 5.0, 6.125)
    assert of_slowest_loader(slowest, a_trainer(others=(other,))) == slowest
    assert of_slowest_loader(other, a_trainer(others=(slowest,))) == slowest


def test_the_cores_of_a_machine_are_shared_by_its_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "usable_cores", lambda: 16)
    monkeypatch.setattr(metrics, "local_world_size", lambda: 4)
    callback = StepMetrics(1, 16, 96)
    callback.on_train_start(a_trainer(), None)  # type: ignore[arg-type]
    assert (callback._watch.loading.cores, callback._watch.loading.workers) == (4, 3)


@pytest.mark.parametrize(("device", "calls"), [("cuda", ["reset", "empty"]), ("cpu", [])])
def test_peak_memory_is_of_the_run_and_given_back_at_its_end(device, calls, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: called.append("reset"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: called.append("empty"))
    callback = StepMetrics(1, 16, 96)
    callback.on_train_start(a_trainer(device), None)  # type: ignore[arg-type]
    callback.teardown(a_trainer(device), None, "fit")  # type: ignore[arg-type]
    assert called == calls


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Inside, the system writes no file beyond a size, as on a disk that is full in the middle of a row."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("at_end", [False, True], ids=["with a later row", "at the end"])
def test_rows_that_cannot_be_written_are_written_later(
    at_end: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logger = MetricsCSV(tmp_path / "metrics.csv")
    rows = [{"step": step, "train/loss": 1.2345678 / step} for step in range(1, 5)]
    for row in rows[:2]:
        logger.log_metrics({"train/loss": row["train/loss"]}, step=int(row["step"]))
    with largest_file(logger.path.stat().st_size + 8):
        for row in rows[2:]:
            logger.log_metrics({"train/loss": row["train/loss"]}, step=int(row["step"]))
        assert read_metrics(logger.path) == rows[:2], "half a row is none"
        assert list(tmp_path.iterdir()) == [logger.path]
    assert caplog.text.count("metrics.csv cannot be written: File too large. Its rows are kept and written later.") == 1
    if at_end:
        logger.finalize("success")
    else:
        logger.log_metrics({"val/loss": 2.0}, step=4)
        rows[3]["val/loss"] = 2.0
    assert read_metrics(logger.path) == rows
