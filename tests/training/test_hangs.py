"""A run that hangs ends and says what hangs: a stopped rank, a worker, a read; and a slow one does not."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from clip_exp.training.opening import identity
from tests.compose import train_config
from tests.conftest import REPOSITORY, Run
from tests.exhaustive import repeat_beyond
from tests.runs import TINY, Finished, run_folders
from tests.training.faults import ALLOWED, overrides
from tests.training.test_failures import left_behind, train_under_torchrun

HANG_S = 3
LIMITS = (f"hang_timeout_s={HANG_S}", "data.timeout_s=2.4")
RESUMED = tuple(word for word in TINY if word != "resume=never")
STRATEGIES = {"ddp": "strategy=ddp", "zero2": "strategy=deepspeed_stage_2", "zero3": "strategy=deepspeed_stage_3"}
CASES = [(kind, strategy, rank) for kind in ("stop", "hang") for strategy in STRATEGIES for rank in (0, 1)]


def assert_gone(folder: Path) -> None:
    assert left_behind(folder) == []
    assert not [*folder.glob(".heartbeat*"), *folder.glob(".error*"), *folder.glob(".lock-rank*")]


@pytest.mark.parametrize("case", repeat_beyond([("stop", "ddp", 1)], CASES), ids=str)
def test_a_rank_that_hangs_ends_all_and_the_same_command_resumes_to_the_same_end(
    case: tuple[str, str, int], command: Run, tmp_path: Path
) -> None:
    kind, strategy, rank = case
    arguments = (*RESUMED, "max_steps=6", "checkpoint_every_n_steps=2", "val_every_n_steps=3", "log_every_n_steps=1")

    def train(folder: Path, marker: Path) -> subprocess.CompletedProcess[str]:
        fault = overrides(kind, rank, marker=str(marker))
        own = (*LIMITS, STRATEGIES[strategy], "trainer.devices=2", f"output_dir={folder}")
        return command("train.py", *arguments, *fault, *own, cwd=tmp_path, **ALLOWED)

    hung = train(tmp_path / "hung", tmp_path / "marker")
    assert hung.returncode == 6, hung.stderr
    assert f"rank {rank} of 2 (process" in hung.stderr
    assert "of step 3 (limit" in hung.stderr
    assert ("It was stopped by a signal (state T)" in hung.stderr) == (kind == "stop")
    (folder,) = run_folders(tmp_path / "hung")
    record = Finished(folder, "").record
    assert (record["status"], record["exit_code"]) == ("failed", 6)
    assert f"rank {rank} of 2" in record["error"][-1]
    assert f"rank {rank} of 2" in (folder / "errors.log").read_text()
    assert_gone(folder)
    resumed = train(tmp_path / "hung", tmp_path / "marker")
    assert resumed.returncode == 0, resumed.stderr
    assert run_folders(tmp_path / "hung") == [folder]
    undisturbed = train(tmp_path / "undisturbed", tmp_path / "marker")
    assert undisturbed.returncode == 0, undisturbed.stderr
    (other,) = run_folders(tmp_path / "undisturbed")
    for file in ("model.safetensors", "manifest.json"):
        assert (folder / "checkpoints" / "step-000006" / file).exists()
    expected = Finished(other, "")
    assert Finished(folder, "").losses == expected.losses
    states = [path.relative_to(other) for path in (other / "checkpoints" / "step-000006").glob("*.safetensors")]
    assert states
    for state in states:
        assert (folder / state).read_bytes() == (other / state).read_bytes()


@pytest.mark.parametrize("devices", repeat_beyond([1], [1, 2]))
def test_a_stopped_worker_ends_the_run_and_is_named(devices: int, command: Run, tmp_path: Path) -> None:
    workers = ("data.num_workers=2", f"trainer.devices={devices}", f"output_dir={tmp_path}")
    fault = overrides("worker", devices - 1)
    done = command("train.py", *TINY, "max_steps=20", *fault, *LIMITS, *workers, cwd=tmp_path, **ALLOWED)
    assert done.returncode == 3, done.stderr
    assert "data loader worker" in done.stderr
    assert "It was stopped by a signal (state T)" in done.stderr
    assert (" of rank 1 has" in done.stderr) == (devices == 2)
    (folder,) = run_folders(tmp_path)
    assert (Finished(folder, "").record["status"], Finished(folder, "").record["exit_code"]) == ("failed", 3)
    assert_gone(folder)


# With workers, tests/data/test_reading.py holds the promise in `make test`.
@pytest.mark.parametrize("case", repeat_beyond([(0, 1)], [(0, 1), (0, 2), (2, 1), (2, 2)]), ids=str)
def test_a_read_that_never_ends_ends_the_run_and_the_row_is_named(
    case: tuple[int, int], command: Run, tmp_path: Path
) -> None:
    workers, devices = case
    blocking = "data.transform={_target_:tests.training.faults.Blocking,image_size:32}"
    own = (f"data.num_workers={workers}", f"trainer.devices={devices}", f"output_dir={tmp_path}")
    words = tuple(word for word in TINY if not word.startswith("data.num_workers"))
    done = command("train.py", *words, "max_steps=20", blocking, *LIMITS, *own, cwd=tmp_path, **ALLOWED)
    assert done.returncode == 3, done.stderr
    assert "reading train/" in done.stderr
    assert "raise data.timeout_s" in done.stderr
    (folder,) = run_folders(tmp_path)
    assert "reading train/" in Finished(folder, "").record["error"][-1]
    assert_gone(folder)


@pytest.mark.parametrize("devices", repeat_beyond([1], [1, 2]))
def test_slow_steps_and_a_slow_validation_end_no_run(devices: int, command: Run, tmp_path: Path) -> None:
    """Each step and each batch of the validation takes longer than the limit of a step that is not known to be slow."""
    slow = "+callbacks.extra.slow={_target_:tests.training.faults.Slow,seconds:1.2}"
    limits = ("hang_timeout_s=1", "data.timeout_s=0.8")
    steps = ("max_steps=2", "val_every_n_steps=2", f"trainer.devices={devices}", f"output_dir={tmp_path}")
    done = command("train.py", *TINY, slow, *limits, *steps, cwd=tmp_path, **ALLOWED)
    assert done.returncode == 0, done.stderr


@pytest.mark.exhaustive
@pytest.mark.parametrize(("kind", "rank"), [("stop", 0), ("stop", 1), ("hang", 1), ("hold", 0)])
def test_under_torchrun_a_rank_that_hangs_ends_all(kind: str, rank: int, tmp_path: Path) -> None:
    done = train_under_torchrun(tmp_path, *overrides(kind, rank), *LIMITS)
    assert done.returncode != 0
    (folder,) = run_folders(tmp_path)
    record = Finished(folder, "").record
    assert (record["status"], record["exit_code"]) == ("failed", 6)
    for text in (done.stderr, record["error"][-1]):
        assert f"rank {rank} of 2 (process" in text
        assert "of step 3 (limit" in text
    assert left_behind(folder) == []


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "launcher", [(), ("-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone")], ids=str
)
def test_a_run_of_which_every_process_was_suspended_continues(launcher: tuple[str, ...], tmp_path: Path) -> None:
    arguments = [*TINY, "max_steps=1000", "data.num_workers=1", *LIMITS, f"output_dir={tmp_path}"]
    arguments += [] if launcher else ["trainer.devices=2"]
    with subprocess.Popen(
        [sys.executable, *launcher, str(REPOSITORY / "train.py"), *arguments], cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    ) as run:  # fmt: skip
        while not any((folder / "metrics.csv").exists() for folder in run_folders(tmp_path)):
            assert run.poll() is None
            time.sleep(0.2)
        processes = descendants(run.pid)
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for process in processes:
                os.kill(process, number)
            if number is signal.SIGSTOP:
                time.sleep(4 * HANG_S)
        time.sleep(2 * HANG_S)
        assert run.poll() is None
        os.kill(run.pid, signal.SIGTERM)
        assert run.stderr is not None
        assert "hangs" not in run.stderr.read()


def descendants(process: int) -> list[int]:
    """A process and all that it started, directly or not."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found = [process]
    for each in found:
        found += [child for child, parent in parents.items() if parent == each]
    return found


def test_the_limits_are_not_part_of_what_identifies_a_run() -> None:
    words = ("trainer.accelerator=cpu", "hang_timeout_s=null", "data.timeout_s=7")
    assert identity(train_config(*words)) == identity(train_config(words[0]))
