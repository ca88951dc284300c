"""A step whose gradient is not finite changes nothing, under every strategy and with every optimizer; too many end the run."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from timm.optim import Lion
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from clip_exp.errors import NumericError
from clip_exp.training.skipped_steps import SkippedSteps, skip_step
from tests.conftest import Run
from tests.exhaustive import repeat_beyond
from tests.runs import TINY, Finished, run_folders
from tests.synchronization import SynchronizationWatch
from tests.training.faults import ALLOWED

STRATEGIES = {
    "auto": (),
    "ddp": ("strategy=ddp", "trainer.devices=2"),
    "ZeRO-1": ("strategy=deepspeed_stage_1", "trainer.devices=2"),
    "ZeRO-2": ("strategy=deepspeed_stage_2", "trainer.devices=2"),
    "ZeRO-3": ("strategy=deepspeed_stage_3", "trainer.devices=2"),
}
# Three steps before the checkpoint of step 8, and all after step 10
STEPS = "3,4,7,11,12,13,14,15,16,17,18,19,20"
LENGTH = ("max_steps=20", "log_every_n_steps=2", "checkpoint_every_n_steps=8", "max_skipped_steps=3")


def fault(rank: int, steps: str = STEPS) -> str:
    return f"+callbacks.extra.fault={{_target_:tests.training.faults.NotANumber,steps:[{steps}],rank:{rank}}}"


def spoiled(command: Run, folder: Path, rank: int, *overrides: str) -> Any:
    folder.mkdir(exist_ok=True)
    arguments = [each for each in TINY if each != "resume=never"]
    return command(
        "train.py", *arguments, *LENGTH, fault(rank), *overrides, f"output_dir={folder}", cwd=folder, **ALLOWED
    )


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "checkpoints/step-000008/model.safetensors")


@pytest.fixture(scope="module")
def in_one_process(command: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, dict[str, Tensor]]:
    """Result of the command, the run folder, and the weights of step 8."""
    output_dir = tmp_path_factory.mktemp("nan") / "auto"
    done = spoiled(command, output_dir, 0)
    (folder,) = run_folders(output_dir)
    return done, folder, weights(folder)


def check_end(done: Any, folder: Path) -> None:
    assert done.returncode == 5, done.stderr
    assert "Steps 3 and 4 had a gradient that is not finite and left the weights unchanged." in done.stderr
    assert "4 steps in a row were skipped, more than max_skipped_steps=3" in done.stderr
    record = json.loads((folder / "run.json").read_text())
    assert (record["status"], record["exit_code"], record["last_checkpoint_step"]) == ("failed", 5, 8)
    rows = {row["step"]: row for row in Finished(folder, "").metrics}
    assert [rows[step].get("train/skipped_steps") for step in (2, 4, 8, 10, 12)] == [None, 2, 3, 3, 5]
    assert "train/loss" not in rows[4]  # it was skipped
    assert all(torch.isfinite(value).all() for value in weights(folder).values())


def test_the_run_ends_with_the_steps_and_rows_named_and_a_resumed_one_says_that_it_meets_them_again(
    in_one_process: tuple[Any, Path, dict[str, Tensor]], command: Run
) -> None:
    done, folder, _ = in_one_process
    check_end(done, folder)
    assert "The rows of step 4: " in done.stderr
    again = spoiled(command, folder.parents[2], 0)
    assert again.returncode == 5
    assert "resuming from" in again.stdout
    assert "Unchanged, it will meet the same rows again." in again.stderr
    assert "max_skipped_steps" in again.stderr
    allowed = spoiled(command, folder.parents[2], 0, "max_skipped_steps=10")
    assert allowed.returncode == 0, allowed.stderr
    (run,) = run_folders(folder.parents[2])
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["steps"], summary["skipped_steps"]) == (20, 13)
    assert "skipped steps: 13, because their gradient was not finite" in allowed.stdout


@pytest.mark.parametrize("name", repeat_beyond(("ddp", "ZeRO-2", "ZeRO-3"), [*STRATEGIES][1:]))
def test_a_rank_with_a_gradient_that_is_not_finite_lets_all_ranks_skip_under_every_strategy(
    name: str, in_one_process: tuple[Any, Path, dict[str, Tensor]], command: Run, tmp_path: Path
) -> None:
    done = spoiled(command, tmp_path, 1, *STRATEGIES[name])
    (folder,) = run_folders(tmp_path)
    check_end(done, folder)
    torch.testing.assert_close(weights(folder), in_one_process[2], rtol=0, atol=1e-5)


OPTIMIZERS = {
    "fused AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "fused Adam": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1),
    "fused SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, fused=True),
    "Lion": lambda p: Lion(p, lr=0.1, weight_decay=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_skipped_step_leaves_weights_and_optimizer_state_bitwise_unchanged(name: str, value: float) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = OPTIMIZERS[name](model.parameters())

    def step(gradient: float) -> None:
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 0.5)
        model.weight.grad[0, 0] = gradient  # type: ignore[index]
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        skip_step(optimizer, ~torch.isfinite(norm))
        optimizer.step()

    step(value)  # also as the first step, which creates the state
    step(0.1)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    step(value)
    for ours, theirs in zip((model.state_dict(), optimizer.state_dict()), before, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    step(0.1)
    assert not torch.equal(model.weight, before[0]["weight"])


def module(model: nn.Module, loss: float, skipped: bool) -> Any:
    return SimpleNamespace(
        buffers=model.buffers, step_metrics={"train/loss": torch.tensor(loss)}, skipped=torch.tensor(skipped)
    )


def trainer(step: int, scale: float | None = None, others: list[int] | None = None) -> Any:
    def reduce(values: Tensor, reduce_op: str) -> Tensor:
        assert reduce_op == "max"
        return values if others is None else torch.maximum(values, torch.tensor(others))

    scaler = None if scale is None else SimpleNamespace(get_scale=lambda: scale)
    return SimpleNamespace(
        global_step=step, strategy=SimpleNamespace(reduce=reduce), precision_plugin=SimpleNamespace(scaler=scaler)
    )


def test_statistics_of_batch_normalization_are_those_before_a_skipped_step() -> None:
    model = nn.BatchNorm1d(3)
    callback = SkippedSteps(1, lambda step: ["a.jpg"])
    callback.on_train_start(trainer(0), module(model, 1.0, False))
    for skipped in (False, True):
        before = copy.deepcopy(model.state_dict())
        callback.on_train_batch_start(trainer(1), module(model, 1.0, skipped), None, 0)
        model(torch.full((2, 3), torch.nan if skipped else 1.0))
        callback.on_train_batch_end(trainer(1), module(model, 1.0, skipped), None, None, 0)
        unchanged = all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert unchanged is skipped


def count(callback: SkippedSteps, decisions: list[bool], loss: float = torch.nan, scale: float | None = None) -> None:
    for step, skipped in enumerate(decisions, start=1):
        callback.on_train_batch_start(trainer(step, scale), module(nn.Identity(), loss, skipped), None, 0)
        callback.on_train_batch_end(trainer(step, scale), module(nn.Identity(), loss, skipped), None, None, 0)


def test_steps_in_a_row_are_counted_across_readings_and_restarts() -> None:
    callback = SkippedSteps(3, lambda step: [f"{step}.jpg"])
    count(callback, [True, False, True, True])
    callback.read(trainer(4))
    assert callback.state_dict() == {"total": 3, "in_a_row": 2}
    resumed = SkippedSteps(3, lambda step: [f"{step}.jpg"])
    resumed.load_state_dict(callback.state_dict())
    count(resumed, [True, True])
    with pytest.raises(
        NumericError, match=r"Steps 5 and 6 .* 4 steps in a row were skipped, more than max_skipped_steps=3"
    ):
        resumed.read(trainer(6))


def test_overflows_by_which_float16_finds_its_scale_are_not_counted() -> None:
    callback = SkippedSteps(0, lambda step: ["a.jpg"])
    count(callback, [True] * 20, loss=2.0, scale=1024.0)
    callback.read(trainer(20))
    assert callback.total == 0
    count(callback, [True], loss=2.0, scale=1.0)  # a lower scale would not help
    with pytest.raises(NumericError):
        callback.read(trainer(21))


def test_a_loss_that_is_not_finite_on_another_rank_is_counted_under_float16() -> None:
    callback = SkippedSteps(5, lambda step: ["a.jpg"])
    count(callback, [True, True], loss=2.0, scale=1024.0)
    callback.read(trainer(2, others=[0, 1]))
    assert callback.total == 1


def test_rows_that_all_skipped_steps_contain_are_named(caplog: pytest.LogCaptureFixture) -> None:
    batches = {1: ["a.jpg", "b.jpg"], 2: ["c.jpg", "b.jpg"]}
    callback = SkippedSteps(5, batches.__getitem__)
    count(callback, [True, True])
    callback.read(trainer(2))
    assert "All of them contain b.jpg." in caplog.text


def test_a_step_does_not_wait_for_the_gpu() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"):
            model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        callback = SkippedSteps(1, lambda step: ["a.jpg"])
        with SynchronizationWatch() as watch:
            norm = torch.ones((), device="cuda")
            owner = SimpleNamespace(
                buffers=model.buffers, step_metrics={"train/loss": norm}, skipped=~torch.isfinite(norm)
            )
            skip_step(optimizer, owner.skipped)
            callback.on_train_start(trainer(0), owner)
            callback.on_train_batch_start(trainer(1), owner, None, 0)
            callback.on_train_batch_end(trainer(1), owner, None, None, 0)
        assert watch.found == []
