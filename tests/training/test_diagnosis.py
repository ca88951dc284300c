import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clip_exp.training.diagnosis import LoaderWatch, Loading, advice, seconds, waiting_share, workers_needed
from clip_exp.training.timing import StepTimes
from tests.runs import Train

STARVED = StepTimes(10, waited_s=6.0, computed_s=4.0, wall_s=10.0)
BUSY = StepTimes(10, waited_s=1.0, computed_s=9.0, wall_s=10.0)
ROOMY = Loading(workers=2, cores=16, image_size=224)


def told(watch: LoaderWatch, *windows: StepTimes) -> list[int]:
    """At which of the windows the watch speaks."""
    return [i for i, window in enumerate(windows) if watch.add(window) is not None]


def test_a_slow_loader_is_told_once_and_not_of_the_first_steps() -> None:
    assert told(LoaderWatch(ROOMY), *[STARVED] * 10) == [2]
    assert told(LoaderWatch(ROOMY), STARVED, *[BUSY] * 10) == []


def test_a_loader_that_becomes_slow_later_is_told_then() -> None:
    assert told(LoaderWatch(ROOMY), *[BUSY] * 5, *[STARVED] * 10) == [6]


def test_many_workers_deliver_in_bursts_and_are_watched_for_longer() -> None:
    assert told(LoaderWatch(Loading(16, 32, 224)), *[STARVED] * 20) == [14]


def test_a_hiccup_in_two_seconds_is_no_bottleneck() -> None:
    assert told(LoaderWatch(ROOMY), *[StepTimes(10, 0.006, 0.004, 0.01)] * 50) == []


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
    assert text.endswith("would keep up, as far as training on the CPU leaves them cores.")


def test_waiting_is_judged_by_the_wall_clock() -> None:
    """A GPU that idles for the process needs no more workers."""
    launch_bound = StepTimes(10, waited_s=1.5, computed_s=1.5, wall_s=10.0)
    assert told(LoaderWatch(ROOMY), *[launch_bound] * 10) == []
    assert "60 % of the time, 600 ms of 1.00 s per step" in advice(StepTimes(10, 6.0, 1.0, 10.0), ROOMY)


def test_where_the_cores_do_not_suffice_smaller_pictures_are_advised() -> None:
    text = advice(STARVED, Loading(workers=2, cores=4, image_size=224))
    assert "set data.num_workers=3" in text
    assert "about 5 workers" in text
    assert "a shorter side of about 256 pixels" in text
    text = advice(STARVED, Loading(workers=3, cores=4, image_size=336))
    assert "set data.num_workers" not in text
    assert "use already" in text
    assert "384 pixels" in text


def test_the_share_of_a_run_is_of_its_wall_time_and_leaves_the_first_row_out() -> None:
    rows = [
        {"step": 1, "samples_seen": 8, "samples_per_s": 0.1, "data_wait_s": 30.0, "compute_s": 1.0},
        {"step": 10, "samples_seen": 80, "samples_per_s": 8.0, "data_wait_s": 0.0, "compute_s": 1.0},
        {"step": 15, "val/loss": 2.0},
        {"step": 40, "samples_seen": 320, "samples_per_s": 4.0, "data_wait_s": 0.5, "compute_s": 0.5},
    ]
    assert waiting_share(rows) == pytest.approx(15 / (9 + 60))
    assert waiting_share(rows[:1]) is None


def test_seconds_are_written_as_one_reads_them() -> None:
    assert [seconds(value) for value in (0.00041, 0.0123, 0.9, 1.237)] == ["0.4 ms", "12 ms", "900 ms", "1.24 s"]


@pytest.fixture
def slow_pairs(tmp_path: Path) -> Path:
    """Pictures that take much longer to read than a tiny model takes to learn from them."""
    noise = np.random.default_rng(0).integers(0, 256, (1400, 1400, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "0.png", compress_level=1)
    rows = ["filepath,title"]
    for i in range(8):
        if i:
            (tmp_path / f"{i}.png").hardlink_to(tmp_path / "0.png")
        rows.append(f"{i}.png,a picture of noise number {i}")
    (tmp_path / "pairs.csv").write_text("\n".join(rows) + "\n")
    return tmp_path / "pairs.csv"


def test_a_run_tells_once_that_its_loader_is_the_bottleneck(slow_pairs: Path, train: Train) -> None:
    run = train(
        "model=vit_nano", "data=csv", f"data.train={slow_pairs}", "data.num_workers=0", "global_batch_size=2",
        "max_steps=60", "trainer.accelerator=cpu", "resume=never",
    )  # fmt: skip
    assert run.output.count("The loader is the bottleneck") == 1
    assert re.search(r"would keep up|a shorter side of about \d+ pixels", run.output)
    assert (run.folder / "train.log").read_text().count("The loader is the bottleneck") == 1
    assert "waiting for data +" in run.output
    shares = [row["data_wait_s"] * row["samples_per_s"] / 2 for row in run.metrics]
    assert min(shares[1:]) > 0.3
    assert run.summary["data_wait_share"] == pytest.approx(sum(shares[1:]) / len(shares[1:]), abs=0.1)
    assert "waiting for data" in (run.folder / "report.html").read_text()
