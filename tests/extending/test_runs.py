"""Runs with modules of the current folder: sweeps, ranks and workers, schedules of torch, and random numbers of transforms."""

import math
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import OneCycleLR

from clip_exp.config.base import Target
from clip_exp.data.transform import build_transform
from clip_exp.training.optim import build_optimizer, build_scheduler
from tests.compose import train_config
from tests.conftest import Run
from tests.exhaustive import repeat_beyond
from tests.extending.common import DIGITS, SMALL
from tests.extending.test_next import MINE
from tests.runs import Finished, Train, run_folders, unfinish

MORE = """
import numpy as np
from torchvision.transforms import v2


class Noise:
    def __len__(self):
        return 40

    def __getitem__(self, index):
        pixels = np.random.default_rng(index).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        return {"image": pixels, "caption": f"number {index}"}


class Crop:
    def __init__(self, size):
        self.crop = v2.RandomCrop(size)

    def __call__(self, image_CHW):
        return self.crop(image_CHW)
"""
LOSS = ("loss=custom", "loss._target_=mine.Loss")
TORCH = "torch.optim.lr_scheduler"
COSINE = (f"scheduler._target_={TORCH}.CosineAnnealingLR", "scheduler.T_max=${total_steps}", "scheduler.eta_min=1e-5")


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(MINE + MORE)
    return tmp_path


def test_a_sweep_over_an_argument_of_a_loss_trains_every_job(here: Path, command: Run) -> None:
    done = command("train.py", "-m", *SMALL, *DIGITS, *LOSS, "loss.weight=0,1", "max_steps=2", cwd=here)
    assert done.returncode == 0, done.stderr
    runs = [Finished(folder, "") for folder in run_folders(here / "outputs")]
    assert [run.record["status"] for run in runs] == ["finished"] * 2
    assert sorted(run.losses[0] > 0 for run in runs) == [False, True]


def test_ranks_and_workers_find_a_module_of_the_current_folder(here: Path, command: Run) -> None:
    options = (
        *(o for o in SMALL if not o.startswith("data.")), *LOSS, "data=custom", "data._target_=mine.Noise", "data.num_workers=1",
        "+data.transform={_target_: mine.Crop, size: 32}", "+data.val={_target_: mine.Noise}", "max_steps=2",
    )  # fmt: skip
    alone = command("train.py", *options, "name=alone", cwd=here)
    # Started as a user starts it: the folder is in the import path of none of the processes.
    both = command("train.py", *options, "name=both", "trainer.devices=2", cwd=here, cold=True, PYTHONPATH="")
    for done in (alone, both):
        assert done.returncode == 0, done.stdout + done.stderr
    losses = {folder.parent.name: Finished(folder, "").losses for folder in run_folders(here / "outputs")}
    assert losses["both"] == pytest.approx(losses["alone"], rel=1e-5)


def cosine_after_warmup(step: int, warmup: int, steps: int, peak: float) -> float:
    """Rate of a step by the formula in the documentation of CosineAnnealingLR, after a linear warm-up."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return 1e-5 + (peak - 1e-5) * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


@pytest.mark.parametrize("warmup", [3, 0])
def test_the_rates_of_a_schedule_of_torch_follow_its_formula_after_the_warmup(warmup: int) -> None:
    config = train_config(*COSINE, f"scheduler.warmup_steps={warmup}", "optimizer.lr=1e-3")
    rates = rates_of(config, 12)
    assert rates == pytest.approx([cosine_after_warmup(step, warmup, 12, 1e-3) for step in range(12)], rel=1e-6)


def rates_of(config: Any, steps: int) -> list[float]:
    optimizer = build_optimizer(torch.nn.Linear(2, 2), config.optimizer)
    scheduler = build_scheduler(optimizer, config.scheduler, steps)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_one_cycle_is_given_the_steps_of_the_run() -> None:
    config = train_config(f"scheduler._target_={TORCH}.OneCycleLR", "scheduler.max_lr=1e-2", "scheduler.warmup_steps=0")
    optimizer = torch.optim.AdamW(torch.nn.Linear(2, 2).parameters())
    expected = OneCycleLR(optimizer, max_lr=1e-2, total_steps=10)
    theirs = []
    for _ in range(10):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if len(theirs) < 10:
            expected.step()
    assert rates_of(config, 10) == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("name", repeat_beyond(("CosineAnnealingLR",), ("CosineAnnealingLR", "OneCycleLR")))
def test_a_run_with_a_schedule_of_torch_is_resumed_bitwise_equal(name: str, train: Train, tmp_path: Path) -> None:
    schedule = COSINE if name.startswith("Cos") else (f"scheduler._target_={TORCH}.OneCycleLR", "scheduler.max_lr=1e-3")
    warmup = f"scheduler.warmup_steps={2 if name.startswith('Cos') else 0}"
    options = (*(o for o in SMALL if not o.startswith("resume")), *DIGITS, *schedule, warmup)
    length = ("max_steps=8", "checkpoint_every_n_steps=4")
    whole = train(*options, *length, "name=run")
    if name.startswith("Cos"):
        logged = [row["train/lr"] for row in whole.metrics]
        assert logged == pytest.approx([cosine_after_warmup(step, 2, 8, 1e-3) for step in range(8)], rel=1e-6)
    folder = tmp_path / "train" / "run" / whole.folder.name
    shutil.copytree(whole.folder, folder)
    shutil.rmtree(folder / "checkpoints" / "step-000008")
    unfinish(folder)
    run = train(*options, *length, "name=run", output_dir=tmp_path)
    assert "resuming from" in run.output
    assert [row["train/lr"] for row in run.metrics] == [row["train/lr"] for row in whole.metrics]
    assert run.losses == whole.losses
    assert all(torch.equal(run.weights[name], weight) for name, weight in whole.weights.items())


def drawn(image_CHW: torch.Tensor) -> torch.Tensor:
    """An image that holds numbers of the three generators."""
    result = image_CHW[:, :32, :32].clone()
    for channel, number in enumerate((random.random(), np.random.random(), torch.rand(()).item())):
        result[channel] = int(number * 256)
    return result


def test_a_transform_draws_the_same_numbers_for_a_sample_whatever_was_drawn_before() -> None:
    node = Target.model_validate({"_target_": f"{__name__}.drawn", "_partial_": True})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLIP_EXP_ALLOWED_TARGETS", "tests")
        transform = build_transform(node, 32)
    assert transform is not None
    image = torch.zeros(3, 40, 40, dtype=torch.uint8)
    first, other = transform(image, 1, 2, 3), transform(image, 1, 2, 4)
    for seed in (1, 2):
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        before = random.getstate(), torch.get_rng_state()
        assert torch.equal(transform(image, 1, 2, 3), first)
        assert random.getstate() == before[0]
        assert torch.equal(torch.get_rng_state(), before[1])
    assert all(first[channel, 0, 0] != other[channel, 0, 0] for channel in range(3))
