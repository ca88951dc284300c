"""Tests of the detector of operations that wait for a GPU, which other tests use."""

from collections.abc import Callable
from contextlib import suppress

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from tests.synchronization import SynchronizationWatch


def found(action: Callable[[Tensor], object]) -> list[str]:
    with FakeTensorMode(), SynchronizationWatch() as watch:
        values = torch.zeros(4, device="cuda")
        with suppress(DataDependentOutputException, DynamicOutputShapeException):
            action(values)
    return watch.found


@pytest.mark.parametrize(
    ("action", "operation"),
    [
        (lambda x: x.sum().item(), "_local_scalar_dense"),
        (lambda x: bool(x.any()), "_local_scalar_dense"),
        (lambda x: x.nonzero(), "nonzero"),
        (lambda x: x.masked_select(x > 0), "masked_select"),
        (lambda x: x[x > 0], "index by a mask"),
        (lambda x: x.index_put_((x > 0,), torch.ones(4, device="cuda")), "index_put_ by a mask"),
        (lambda x: x.cpu(), "_to_copy between cpu and cuda"),
        (lambda x: torch.zeros(4).copy_(x), "copy_ between cpu and cuda"),
        (lambda x: torch._foreach_copy_([x], [torch.zeros(4)]), "_foreach_copy_ between cpu and cuda"),
        (lambda x: torch.tensor([0.5, 0.5], device="cuda"), "_to_copy between cpu and cuda"),
    ],
)  # fmt: skip
def test_what_waits_for_the_gpu_is_found_with_its_place(action: Callable[[Tensor], object], operation: str) -> None:
    notes = found(action)
    assert notes
    assert notes[0].startswith(f"{operation} at test_synchronization.py:")


@pytest.mark.parametrize(
    "action",
    [
        lambda x: (x * 2).softmax(0),
        lambda x: x[torch.zeros(2, dtype=torch.int64, device="cuda")],
        lambda x: (x > 0)[torch.zeros(2, dtype=torch.int64, device="cuda")],
        lambda x: torch.where(x > 0, x, 0.0),
        lambda x: x.to(torch.bfloat16),
        lambda x: torch.zeros(4).to("cuda", non_blocking=True),
        lambda x: x.copy_(torch.zeros(4), non_blocking=True),
        lambda x: torch.full((4,), 0.5, device="cuda"),
    ],
)
def test_what_the_gpu_does_by_itself_is_not(action: Callable[[Tensor], object]) -> None:
    assert found(action) == []
