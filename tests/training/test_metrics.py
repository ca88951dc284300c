"""What is measured around the steps of a run and where it goes, by clocks of the test's own, and on pretended GPUs and ranks."""

import json
import re
import resource
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.loggers.logger import Logger

import clip_exp
from clip_exp.checkpoints.io import SafeCheckpointIO
from clip_exp.data import datamodule, loader
from clip_exp.data.loader import Collate
from clip_exp.runs import read_metrics
from clip_exp.training import metrics, summary, tasks
from clip_exp.training.callbacks import AveragedWeights
from clip_exp.training.metrics import (
    GPUClock,
    LoaderWatch,
    Loading,
    MetricsCSV,
    StepClock,
    StepMetrics,
    StepTimes,
    advice,
    build_loggers,
    data_wait_fraction,
    of_slowest_loader,
    seconds,
    start_loggers,
    workers_needed,
)
from clip_exp.training.module import CLIPModule
from clip_exp.training.saving import Checkpointer
from clip_exp.training.skipped_steps import SkippedSteps
from tests.compose import train_config
from tests.runs import TINY, Train, unfinish
from tests.training.tracking import tensorboard_hparams

# ----------------------------------------------------------------------------------------------------- what is measured


NONE_SKIPPED = SkippedSteps(0, lambda step: [])


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
    clock.slow(Checkpointer, "prune", 7000.0)
    clock.slow(tasks, "score_tasks", 8000.0, instead=lambda *_: {})
    monkeypatch.setattr(summary, "write_report", lambda run_dir: run_dir / "report.html")
    return clock


@pytest.mark.usefixtures("clock")
def test_the_logged_rate_is_the_wall_clocks_without_validation_saving_and_scoring(tmp_path: Path) -> None:
    arguments = [
        *(word for word in TINY if word != "resume=never"), "max_steps=8", "log_every_n_steps=1", "val_every_n_steps=4",
        "checkpoint_every_n_steps=5", "task=digits", "task_every_n_steps=3", "callbacks.ema_decay=0.9",
        "callbacks.progress=none", f"output_dir={tmp_path}",
        "checkpoint_async=false",  # a thread would set the clock forward, at any time
    ]  # fmt: skip
    run = clip_exp.train(*arguments)
    rows = read_metrics(run / "metrics.csv")
    assert [row["train/data_wait_s"] for row in rows] == [*[0.5] * 7, 0.0], "the last step finds its batch there"
    assert [row["train/compute_s"] for row in rows] == [1.0] * 8
    step_s = [1.5, *[1.75] * 6, 1.25]  # the weights are averaged after a step is measured
    assert [16 / row["train/samples_per_s"] for row in rows] == pytest.approx(step_s)
    written = json.loads((run / "summary.json").read_text())
    assert written["data_wait_fraction"] == pytest.approx(6 * 0.5 / sum(step_s[1:]))

    shutil.rmtree(run / "checkpoints" / "step-000008")
    unfinish(run)
    assert clip_exp.train(*arguments) == run
    rows = read_metrics(run / "metrics.csv")
    assert [16 / row["train/samples_per_s"] for row in rows[5:]] == pytest.approx([1.5, 1.75, 1.25])


def a_trainer(device: str = "cpu", others: tuple[StepTimes, ...] = ()) -> Any:
    """Stub of a Trainer; `others`: times of the ranks after this one."""

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
    callback = StepMetrics(1, 16, 96, NONE_SKIPPED)
    callback.on_train_start(a_trainer(), None)  # type: ignore[arg-type]
    assert (callback._watch.loading.cores, callback._watch.loading.workers) == (4, 3)


@pytest.mark.parametrize(("device", "calls"), [("cuda", ["reset", "empty"]), ("cpu", [])])
def test_peak_memory_is_of_the_run_and_given_back_at_its_end(device, calls, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: called.append("reset"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: called.append("empty"))
    callback = StepMetrics(1, 16, 96, NONE_SKIPPED)
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
    assert (
        caplog.text.count(
            "metrics.csv cannot be written: File too large. Its rows are kept in memory and written later."
        )
        == 1
    )
    if at_end:
        logger.finalize("success")
    else:
        logger.log_metrics({"val/loss": 2.0}, step=4)
        rows[3]["val/loss"] = 2.0
    assert read_metrics(logger.path) == rows


# --------------------------------------------------------------------------------------------------- the times of steps


@dataclass
class Queue:
    """Simulated asynchronous GPU, with a clock in seconds that it shares with the process."""

    now_s: float = 0.0
    busy_until_s: float = 0.0

    def now(self) -> float:
        return self.now_s

    def compute(self, work_s: float) -> None:
        self.busy_until_s = max(self.busy_until_s, self.now_s) + work_s

    def event(self) -> "Event":
        return Event(self)


@dataclass
class Event:
    queue: Queue
    at_s: float = field(default=0.0)

    def record(self) -> None:
        self.at_s = max(self.queue.busy_until_s, self.queue.now_s)

    def query(self) -> bool:
        return self.queue.now_s >= self.at_s

    def synchronize(self) -> None:
        self.queue.now_s = max(self.queue.now_s, self.at_s)

    def elapsed_time(self, end: "Event") -> float:
        return 1000 * (end.at_s - self.at_s)


def gpu_clock(queue: Queue) -> GPUClock:
    return GPUClock(now=queue.now, event=queue.event)


def test_steps_are_split_into_waiting_and_computing_and_the_wall_time_has_what_lies_between() -> None:
    queue, waited_s = Queue(), 100.0
    clock = StepClock(waited_s, queue.now)
    for _ in range(3):
        queue.now_s += 0.5
        waited_s += 0.5
        clock.begin(waited_s)
        queue.now_s += 0.02
        clock.end()
        queue.now_s += 0.25  # averaging of weights
    times = clock.take()
    assert (times.steps, times.wait_s) == (3, 0.5)
    assert times.compute_s == pytest.approx(0.02)
    assert times.step_s == pytest.approx(0.77)
    assert clock.take() == StepTimes()


def test_the_wall_time_begins_with_the_wait_for_the_first_batch() -> None:
    queue = Queue(now_s=1000.0)
    clock = StepClock(now=queue.now)
    queue.now_s += 60.0  # workers start, or a checkpoint is read
    clock.begin(0.5)
    queue.now_s += 0.25
    clock.end()
    assert clock.take() == StepTimes(1, waited_s=0.5, computed_s=0.25, wall_s=0.75)


def test_a_pause_is_left_out_up_to_the_wait_for_the_next_batch() -> None:
    queue = Queue()
    clock = StepClock(now=queue.now)
    clock.begin(0.0)
    queue.now_s += 1.0
    clock.end()
    queue.now_s += 0.25  # averaging of weights
    clock.pause()
    queue.now_s += 60.0  # a validation
    clock.pause()
    queue.now_s += 60.0  # a save
    queue.now_s += 0.5  # a wait for the next batch
    clock.begin(0.5)
    queue.now_s += 1.0
    clock.end()
    assert clock.take() == StepTimes(2, waited_s=0.5, computed_s=2.0, wall_s=2.75)


def run_on_gpu(steps: int, load_s: float, work_s: float, ask_s: float = 0.01) -> StepTimes:
    """Steps of a process that prepares a batch in `load_s`, then asks the GPU for `work_s` of work, and never waits for it."""
    queue, waited_s = Queue(), 0.0
    clock = gpu_clock(queue)
    for _ in range(steps):
        queue.now_s = max(queue.now_s, queue.busy_until_s - work_s)  # a GPU takes no more than a step in advance
        queue.now_s += load_s
        waited_s += load_s
        clock.begin(waited_s)
        queue.compute(work_s)
        queue.now_s += ask_s
        clock.end()
    return clock.take()


def test_a_gpu_that_starves_is_distinguished_from_one_that_works_while_the_process_waits() -> None:
    starved = run_on_gpu(steps=50, load_s=1.0, work_s=0.4)
    assert starved.steps == 50
    assert starved.compute_s == pytest.approx(0.4)
    assert starved.wait_s == pytest.approx(0.61, abs=0.02)
    busy = run_on_gpu(steps=50, load_s=0.3, work_s=0.4)
    assert busy.compute_s == pytest.approx(0.4)
    assert busy.wait_s < 0.02


@pytest.mark.parametrize(
    ("copy_s", "step_s", "average_s", "between_s", "computing_s"),
    [
        pytest.param(0.003, 0.040, 0.001, 0.001, 0.043, id="the GPU also copies batches and averages weights"),
        pytest.param(0.0005, 0.004, 0.0, 0.012, 0.006, id="the GPU waits for the process"),
    ],
)
def test_the_rate_on_a_gpu_is_that_of_the_wall_clock(copy_s, step_s, average_s, between_s, computing_s) -> None:
    queue = Queue()
    clock = gpu_clock(queue)
    for _ in range(100):
        queue.now_s = max(queue.now_s, queue.busy_until_s - step_s)
        queue.now_s += between_s
        clock.begin(0.0)
        queue.compute(copy_s)
        queue.now_s += 0.002
        queue.compute(step_s)
        clock.end()
        queue.compute(average_s)
    times = clock.take()
    assert times.steps / times.wall_s == pytest.approx(100 / max(queue.now_s, queue.busy_until_s), rel=0.02)
    assert times.compute_s == pytest.approx(computing_s)
    assert times.waited_s == 0.0


def test_a_pause_on_a_gpu_begins_when_it_has_done_all_its_work() -> None:
    queue = Queue()
    clock = gpu_clock(queue)
    for waited_s in (0.0, 0.5):
        clock.begin(waited_s)
        queue.compute(1.0)
        clock.end()
        queue.compute(0.25)  # averaging of weights
        clock.pause()
        queue.now_s += 60.5  # a validation, and a wait of 0.5 s
    assert clock.take() == StepTimes(2, waited_s=0.5, computed_s=2.0, wall_s=3.0)


def test_times_of_steps_add_up() -> None:
    times = StepTimes(2, 1.0, 3.0, 4.0) + StepTimes(3, 4.0, 2.0, 6.0)
    assert times == StepTimes(5, 5.0, 5.0, 10.0)
    assert (times.wait_s, times.compute_s, times.step_s, times.wait_fraction) == (1.0, 1.0, 2.0, 0.5)
    assert StepTimes().wait_fraction == 0.0


# ------------------------------------------------------------------------------------------ whether the loader keeps up


STARVED = StepTimes(10, waited_s=6.0, computed_s=4.0, wall_s=10.0)
BUSY = StepTimes(10, waited_s=1.0, computed_s=9.0, wall_s=10.0)
ROOMY = Loading(workers=2, cores=16, image_size=224)


def steps_with_advice(watch: LoaderWatch, *windows: StepTimes) -> list[int]:
    """At which of the windows the watch speaks."""
    return [i for i, window in enumerate(windows) if watch.add(window) is not None]


def test_a_slow_loader_is_reported_once_and_not_for_the_first_steps() -> None:
    assert steps_with_advice(LoaderWatch(ROOMY), *[STARVED] * 10) == [2]
    assert steps_with_advice(LoaderWatch(ROOMY), STARVED, *[BUSY] * 10) == []


def test_a_loader_that_becomes_slow_later_is_reported_then() -> None:
    assert steps_with_advice(LoaderWatch(ROOMY), *[BUSY] * 5, *[STARVED] * 10) == [6]


def test_many_workers_deliver_in_bursts_and_are_watched_for_longer() -> None:
    assert steps_with_advice(LoaderWatch(Loading(16, 32, 224)), *[STARVED] * 20) == [14]


def test_a_hiccup_in_two_seconds_is_no_bottleneck() -> None:
    assert steps_with_advice(LoaderWatch(ROOMY), *[StepTimes(10, 0.006, 0.004, 0.01)] * 50) == []


@pytest.mark.parametrize(
    ("times", "workers", "needed"),
    [
        (STARVED, 2, 5),  # two workers work 1 s each at a batch, or one 2 s, and training takes 0.4 s
        (STARVED, 0, 2),  # training loads for 0.6 s and computes for 0.4 s
        (StepTimes(10, 3.0, 7.0, 10.0), 0, 1),
        (StepTimes(10, 2.0, 8.0, 10.0), 4, 5),
        (StepTimes(10, 6.0, 1.0, 10.0), 2, 5),  # on a GPU that computes for 0.1 s; the process takes 0.3 s more
    ],
)
def test_the_workers_that_would_keep_up_follow_from_what_was_measured(times, workers, needed) -> None:
    assert workers_needed(times, workers) == needed


def test_the_advice_says_what_is_lost_and_what_to_change() -> None:
    text = advice(STARVED, ROOMY)
    assert "in the last 10 steps training waited for data 60 % of the time, 600 ms of 1.00 s per step" in text
    assert "data.num_workers is 2, and there are 16 cores per rank" in text
    assert text.endswith("data.num_workers=5 would keep up.")
    text = advice(STARVED, Loading(2, 16, 224, shares_cores=True))
    assert text.endswith("would keep up, if training on the CPU leaves enough cores for them.")


def test_waiting_is_judged_by_the_wall_clock() -> None:
    """A GPU that idles for the process needs no more workers."""
    launch_bound = StepTimes(10, waited_s=1.5, computed_s=1.5, wall_s=10.0)
    assert steps_with_advice(LoaderWatch(ROOMY), *[launch_bound] * 10) == []
    assert "60 % of the time, 600 ms of 1.00 s per step" in advice(StepTimes(10, 6.0, 1.0, 10.0), ROOMY)


def test_where_the_cores_do_not_suffice_smaller_images_are_advised() -> None:
    text = advice(STARVED, Loading(workers=2, cores=4, image_size=224))
    assert "set data.num_workers=3" in text
    assert "About 5 workers" in text
    assert "a shorter side of about 256 pixels" in text
    text = advice(STARVED, Loading(workers=3, cores=4, image_size=336))
    assert "set data.num_workers" not in text
    assert "all in use" in text
    assert "384 pixels" in text


def test_the_wait_fraction_of_a_run_is_of_its_wall_time_and_leaves_the_first_row_out() -> None:
    rows = [
        {"step": 1, "samples_seen": 8, "train/samples_per_s": 0.1, "train/data_wait_s": 30.0, "train/compute_s": 1.0},
        {"step": 10, "samples_seen": 80, "train/samples_per_s": 8.0, "train/data_wait_s": 0.0, "train/compute_s": 1.0},
        {"step": 15, "val/loss": 2.0},
        {"step": 40, "samples_seen": 320, "train/samples_per_s": 4.0, "train/data_wait_s": 0.5, "train/compute_s": 0.5},
    ]
    assert data_wait_fraction(rows) == pytest.approx(15 / (9 + 60))
    assert data_wait_fraction(rows[:1]) is None


def test_seconds_are_written_as_one_reads_them() -> None:
    assert [seconds(value) for value in (0.00041, 0.0123, 0.9, 1.237)] == ["0.4 ms", "12 ms", "900 ms", "1.24 s"]


@pytest.fixture
def slow_pairs(tmp_path: Path) -> Path:
    """Images that take much longer to read than a tiny model takes to learn from them."""
    noise = np.random.default_rng(0).integers(0, 256, (1400, 1400, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "0.png", compress_level=1)
    rows = ["filepath,title"]
    for i in range(8):
        if i:
            (tmp_path / f"{i}.png").hardlink_to(tmp_path / "0.png")
        rows.append(f"{i}.png,an image of noise number {i}")
    (tmp_path / "pairs.csv").write_text("\n".join(rows) + "\n")
    return tmp_path / "pairs.csv"


def test_a_run_tells_once_that_its_loader_is_the_bottleneck(slow_pairs: Path, train: Train) -> None:
    run = train(
        "model=vit_nano", "data=csv", f"data.train={slow_pairs}", "data.num_workers=0", "global_batch_size=2",
        "max_steps=60", "trainer.accelerator=cpu", "resume=never",
    )  # fmt: skip
    assert run.output.count("The data loader is the bottleneck") == 1
    assert re.search(r"would keep up|a shorter side of about \d+ pixels", run.output)
    assert (run.folder / "train.log").read_text().count("The data loader is the bottleneck") == 1
    assert "waiting for data +" in run.output
    fractions = [row["train/data_wait_s"] * row["train/samples_per_s"] / 2 for row in run.metrics]
    assert min(fractions[1:]) > 0.3
    assert run.summary["data_wait_fraction"] == pytest.approx(sum(fractions[1:]) / len(fractions[1:]), abs=0.1)
    assert "waiting for data" in (run.folder / "report.html").read_text()


# ------------------------------------------------------------------------------------ loggers that a run can do without


def started(folder: Path, *overrides: str) -> list[Logger]:
    config = train_config("logger=tensorboard", *overrides)
    return start_loggers(build_loggers(config.logger, folder, config.name), config)


def test_a_logger_that_cannot_write_is_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "tensorboard").touch()
    assert [type(logger).__name__ for logger in started(tmp_path)] == ["MetricsCSV"]
    assert "TensorBoardLogger failed: " in caplog.text
    assert "Training continues without it" in caplog.text


def test_a_logger_that_fails_later_is_reported_once_and_called_no_more(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int | None] = []

    def fail(logger: Logger, metrics: dict[str, float], step: int | None = None) -> None:
        calls.append(step)
        if step == 2:
            raise ValueError("a value that cannot be logged") from OSError(28, "No space left on device")

    monkeypatch.setattr(TensorBoardLogger, "log_metrics", fail)
    threads = threading.active_count()
    _, tensorboard = started(tmp_path)
    calls.clear()
    for step in (1, 2, 3):
        tensorboard.log_metrics({"train/loss": 1.0}, step=step)
    tensorboard.save()
    tensorboard.finalize("success")
    assert calls == [1, 2]
    assert threading.active_count() == threads
    assert caplog.text.count("No space left on device") == 1


def test_what_a_logger_is_given_has_no_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "s3cret-value")
    _, tensorboard = started(tmp_path, "monitor='val/s3cret-value'")
    tensorboard.finalize("success")
    assert tensorboard_hparams(tmp_path / "tensorboard")["monitor"] == "val/***"
