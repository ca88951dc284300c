"""A run with a user's data set, transform and a loss with weights of its own continues where it was killed, and saves what it should."""

import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import clip_exp
from clip_exp.checkpoints.folders import checkpoints, latest
from clip_exp.checkpoints.io import SafeCheckpointIO
from tests.conftest import Run
from tests.extending.common import EXAMPLES, SMALL, csv_of, only_run, write_pairs, write_photos
from tests.runs import Finished, Train, unfinish

# The step after which a process that finds the file `kill` kills itself, as the kernel does where memory runs out
KILLED = """

import functools, os, pathlib, signal

_forward = Predictor.forward


@functools.wraps(_forward)
def forward(self, *args, **kwargs):
    self.steps = getattr(self, "steps", 0) + self.training
    if self.steps == 4 and pathlib.Path("kill").exists():
        os.kill(os.getpid(), signal.SIGKILL)
    return _forward(self, *args, **kwargs)


Predictor.forward = forward
"""
RUN = (
    "--config-dir", "mine/conf", *(o for o in SMALL if not o.startswith(("resume", "data."))), "data=photo_folder", "data.root=photos",
    "loss=predictor", "data/transform=cutout", "data.transform.hole=8", "callbacks=ema", "max_steps=6", "checkpoint_every_n_steps=2",
    "checkpoint_async=false",  # the kill comes milliseconds after a save
)  # fmt: skip


@pytest.fixture(scope="module")
def run_in(command: Run) -> Callable[..., int]:
    """Return a function that runs the command in a folder with a copy of the examples, and returns its exit code."""

    def run(here: Path, *more: str) -> int:
        if not (here / "mine").exists():
            shutil.copytree(EXAMPLES, here / "mine")
            with (here / "mine" / "predictor.py").open("a") as file:
                file.write(KILLED)
            (here / "photos").mkdir()
            write_photos(here / "photos")
        done = command("train.py", *RUN, *more, cwd=here)
        assert "Traceback" not in done.stderr, done.stderr
        return done.returncode

    return run


@pytest.fixture(scope="module")
def whole(run_in: Callable[..., int], tmp_path_factory: pytest.TempPathFactory) -> Finished:
    here = tmp_path_factory.mktemp("whole")
    assert run_in(here, "data.num_workers=0") == 0
    return Finished(only_run(here), "")


def state_of(run: Finished) -> dict[str, Any]:
    """The training state of the last checkpoint."""
    return SafeCheckpointIO().load_checkpoint(latest(run.folder))


def test_a_killed_run_continues_with_other_workers_and_ends_bitwise_equal(
    whole: Finished, run_in: Callable[..., int], tmp_path: Path
) -> None:
    (tmp_path / "kill").touch()
    assert run_in(tmp_path, "data.num_workers=2") == -signal.SIGKILL
    folder = only_run(tmp_path)
    assert [path.name for path in checkpoints(folder)] == ["step-000002"]
    (tmp_path / "kill").unlink()
    assert run_in(tmp_path, "data.num_workers=1") == 0
    run = Finished(only_run(tmp_path), "")
    assert run.folder == folder
    assert run.losses == whole.losses
    assert run.weights.keys() == whole.weights.keys()
    assert all(torch.equal(run.weights[name], weight) for name, weight in whole.weights.items())
    ours, theirs = state_of(run), state_of(whole)
    for key in ("loss_state", "ema_loss_state"):
        assert_equal_tensors(ours[key], theirs[key])
    averages = [load_file(latest(each.folder) / "ema.safetensors") for each in (run, whole)]
    assert_equal_tensors(*averages)


def assert_equal_tensors(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert len(ours) > 0
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


def test_the_head_is_in_the_state_and_its_average_but_not_in_the_model(whole: Finished) -> None:
    state = state_of(whole)
    head = {f"function.head.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")}
    assert state["loss_state"].keys() == state["ema_loss_state"].keys() == head
    for name in head:
        assert not torch.equal(state["loss_state"][name], state["ema_loss_state"][name]), (
            "an average of different weights"
        )
    folder = latest(whole.folder)
    for file in ("model.safetensors", "ema.safetensors"):
        keys = load_file(folder / file).keys()
        assert not any("head" in key or key.startswith("loss") for key in keys)
    loaded = clip_exp.load(whole.folder, accelerator="cpu", allow_targets=["photo_folder", "predictor", "cutout"])
    assert loaded.model.state_dict().keys() == load_file(folder / "model.safetensors").keys()


def test_the_norm_that_is_clipped_contains_the_heads_gradient(train: Train, tmp_path: Path) -> None:
    words = (
        "--config-dir",
        str(EXAMPLES / "conf"),
        *SMALL,
        *csv_of(write_pairs(tmp_path)),
        "loss=predictor",
        "max_steps=2",
    )
    sgd = (
        "optimizer=sgd",
        "optimizer.lr=1.0",
        "optimizer.weight_decay=0",
        "optimizer.momentum=0",
        "scheduler.warmup_steps=0",
    )
    limit = 1e-3
    before = train(*words, *sgd, "trainer.gradient_clip_val=1e-9", "max_steps=1")
    after = train(*words, *sgd, f"trainer.gradient_clip_val={limit}", "max_steps=1")
    # The first update moves all weights together, the head's among them, by the rate times the limit.
    moved = [after.weights[name] - weight for name, weight in before.weights.items()]
    head = state_of(before)["loss_state"]
    of_head = [state_of(after)["loss_state"][name] - weight for name, weight in head.items()]
    norm = torch.stack([difference.square().sum() for difference in (*moved, *of_head)]).sum().sqrt()
    assert torch.stack([difference.square().sum() for difference in of_head]).sum().sqrt() > 0.01 * limit
    assert norm.item() == pytest.approx(limit, rel=1e-3)


def test_the_teacher_is_in_no_file_and_another_one_is_refused(train: Train, command: Run, tmp_path: Path) -> None:
    data = csv_of(write_pairs(tmp_path))
    teachers = [train(*SMALL, *data, "max_steps=1", f"seed={seed}").folder for seed in (1, 2)]
    moving = tmp_path / "teacher"
    shutil.copytree(teachers[0], moving)
    words = (
        "--config-dir",
        str(EXAMPLES / "conf"),
        *(o for o in SMALL if not o.startswith("resume")),
        *data,
        "loss=distillation",
    )
    run = train(*words, f"loss.teacher={moving}", "max_steps=2", "checkpoint_every_n_steps=1", output_dir=tmp_path)
    checkpoint = latest(run.folder)
    assert not [name for name in state_of(run)["loss_state"] if "teacher" in name]
    assert run.weights.keys() == load_file(latest(teachers[0]) / "model.safetensors").keys()
    weights = sum(weight.nbytes for weight in run.weights.values())
    size = sum(file.stat().st_size for file in checkpoint.iterdir())
    assert 3 * weights < size < 3.3 * weights, "the weights and two moments of each"
    shutil.rmtree(moving)
    shutil.copytree(teachers[1], moving)
    unfinish(run.folder)
    shutil.rmtree(checkpoint)
    refused = command("train.py", *words, f"loss.teacher={moving}", "max_steps=2", "checkpoint_every_n_steps=1",
                      f"output_dir={tmp_path}", cwd=tmp_path)  # fmt: skip
    assert refused.returncode == 4, refused.stdout + refused.stderr
    assert (
        "the frozen weights of the loss differ from those that the run started with. Restore them, or set"
        in refused.stderr
    )
    assert "Traceback" not in refused.stderr
    shutil.rmtree(moving)
    shutil.copytree(teachers[0], moving)
    resumed = train(*words, f"loss.teacher={moving}", "max_steps=2", "checkpoint_every_n_steps=1", output_dir=tmp_path)
    assert resumed.folder == run.folder
    assert resumed.losses == run.losses
