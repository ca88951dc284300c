"""Averaged weights without a run: as torch averages them, and without waiting for the GPU."""

import copy
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from clip_exp.checkpoints.io import EMA_KEY
from clip_exp.training.callbacks import AveragedWeights
from clip_exp.training.skipped_steps import SkippedSteps
from tests.synchronization import SynchronizationWatch

NONE_SKIPPED = SkippedSteps(0, lambda step: [])


def network(device: str = "cpu") -> nn.Module:
    """With buffers of numbers of both kinds: running statistics, and how many batches they are of."""
    with torch.device(device):
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def step(callback: AveragedWeights, model: nn.Module, number: int) -> None:
    callback.on_train_batch_end(
        trainer(global_step=number), SimpleNamespace(model=model, loss=nn.Identity()), None, None, 0
    )


def trainer(**values: Any) -> Any:
    return SimpleNamespace(**values)


def started(callback: AveragedWeights, model: nn.Module) -> AveragedWeights:
    callback.on_train_start(trainer(), SimpleNamespace(model=model, loss=nn.Identity()))
    return callback


def test_the_average_is_that_of_torch() -> None:
    torch.manual_seed(0)
    model = network()
    expected = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    expected.n_averaged.fill_(1)  # it starts as the model
    callback = started(AveragedWeights(0.9, NONE_SKIPPED, every_n_steps=2), model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for number in range(1, 8):
        model(torch.randn(5, 3)).square().mean().backward()
        optimizer.step()
        step(callback, model, number)
        if number % 2 == 0:
            expected.update_parameters(model)
    assert callback.average is not None
    averaged, reference = callback.average.state_dict(), expected.module.state_dict()
    assert averaged["1.num_batches_tracked"] == 6
    assert averaged.keys() == reference.keys()
    for name, value in reference.items():
        torch.testing.assert_close(averaged[name], value, rtol=1e-6, atol=1e-7)


def test_a_skipped_step_leaves_the_average_unchanged() -> None:
    model = network()
    skipped = SkippedSteps(0, lambda step: [])
    callback = started(AveragedWeights(0.9, skipped), model)
    assert callback.average is not None
    before = copy.deepcopy(callback.average.state_dict())
    for number, decision in ((1, True), (2, False)):
        nn.init.ones_(model[0].weight)  # type: ignore[index]
        skipped.now = torch.tensor(decision)
        step(callback, model, number)
        assert torch.equal(callback.average.state_dict()["0.weight"], before["0.weight"]) is decision


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside, CUDA tensors are pretended, which cannot be copied deeply: the average is a network of its own."""
    monkeypatch.setattr(copy, "deepcopy", lambda _: network("cuda"))
    with FakeTensorMode():
        yield


@pytest.mark.usefixtures("on_a_gpu")
def test_an_update_of_the_average_does_not_wait_for_the_gpu() -> None:
    model = network("cuda")
    skipped = SkippedSteps(0, lambda step: [])
    skipped.now = torch.tensor(False, device="cuda")
    callback = started(AveragedWeights(0.9, skipped), model)
    with SynchronizationWatch() as watch:
        step(callback, model, 1)
    assert watch.found == []


@pytest.mark.usefixtures("on_a_gpu")
def test_only_the_first_rank_copies_the_average_off_the_gpu() -> None:
    callback = started(AveragedWeights(0.9, NONE_SKIPPED), network("cuda"))
    first: dict[str, Any] = {}
    other: dict[str, Any] = {}
    callback.on_save_checkpoint(trainer(is_global_zero=True), None, first)
    callback.on_save_checkpoint(trainer(is_global_zero=False), None, other)
    assert {value.device.type for value in first[EMA_KEY].values()} == {"cpu"}
    assert other == {}
