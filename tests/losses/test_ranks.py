"""Two and four processes with equal parts of a batch against one process with all of it."""

import os
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from clip_exp.config.data import PairLabel
from clip_exp.config.targets import allowed
from clip_exp.config.training import LossConfig
from clip_exp.losses.batch import CLIPOutput, gather, gather_with_grad
from clip_exp.losses.custom import CustomLossConfig
from clip_exp.losses.sigmoid import SigmoidLossConfig
from clip_exp.losses.sigmoid.loss import sigmoid_loss
from clip_exp.losses.softmax import SoftmaxLossConfig
from tests.losses.largest import LargestTensor
from tests.processes import run_on_ranks

GLOBAL_BATCH, D = 8, 6
ROWS, CHUNK = 64, 8  # of one rank, where memory is measured
CONFIGS: list[LossConfig] = [
    *(SoftmaxLossConfig(same_caption=match, same_image=match) for match in PairLabel),
    *(SigmoidLossConfig(same_caption=match, same_image=match, chunk_size=3) for match in PairLabel),
]
# Losses of users, with the built-in losses that they equal
CUSTOM: dict[str, LossConfig] = {
    "RingSigmoid": SigmoidLossConfig(), "RowSoftmax": SoftmaxLossConfig(), "Softmax": SoftmaxLossConfig()
}  # fmt: skip
CONFIGS += [
    CustomLossConfig.model_validate(
        {"_target_": f"tests.losses.custom.{name}", "gather": name == "Softmax", "init_logit_bias": same.logit_bias}
    )
    for name, same in CUSTOM.items()
]


def step(config: LossConfig, rows: slice) -> dict[str, Tensor]:
    """Value and gradients of a loss on some rows of a fixed batch, in which captions and images occur twice."""
    draw = torch.Generator().manual_seed(0)
    weight_DD = torch.randn(D, D, generator=draw).requires_grad_()  # stands for a tower
    image_BD, text_BD = (torch.randn(GLOBAL_BATCH, D, generator=draw)[rows] for _ in range(2))
    scale, bias = torch.tensor([14.0], requires_grad=True), torch.tensor([-3.0], requires_grad=True)
    caption_id_B = torch.tensor([0, 1, 2, 3, 4, 5, 1, 7])[rows]
    image_id_B = torch.tensor([0, 1, 2, 3, 0, 5, 6, 6])[rows]
    output = CLIPOutput(
        F.normalize(image_BD @ weight_DD, dim=-1), F.normalize(text_BD @ weight_DD.T, dim=-1), scale, bias
    )
    with allowed(["tests"]):
        module = config.build()
    loss = module(output, caption_id_B, image_id_B)
    loss.backward()
    leaves = {"weight": weight_DD, "logit_scale": scale, "logit_bias": bias}
    grads = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {"loss": loss.detach(), **grads}


def largest_in_chunks() -> int:
    """The most elements of a tensor while this rank scores its rows in chunks, forward and backward."""
    image_BD, text_BD = (F.normalize(torch.randn(ROWS, 4), dim=-1).requires_grad_() for _ in range(2))
    scale, bias = torch.tensor([10.0], requires_grad=True), torch.tensor([-10.0], requires_grad=True)
    with LargestTensor() as largest:
        sigmoid_loss(image_BD, text_BD, scale, bias, chunk_size=CHUNK).backward()
    return largest.elements


def run_rank(rank: int, folder: str, world_size: int) -> None:
    warnings.simplefilter("error")  # in a process of its own, pytest's filters do not hold
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    local = GLOBAL_BATCH // world_size
    results = [step(config, slice(rank * local, (rank + 1) * local)) for config in CONFIGS]
    for result in results:
        for tensor in result.values():
            dist.all_reduce(tensor)
            tensor /= world_size
    own_BD = torch.full([2, 3], float(rank), requires_grad=True)
    all_GD = gather_with_grad(own_BD)
    (all_GD * torch.arange(2.0 * world_size)[:, None] * (rank + 1)).sum().backward()
    gathered = {"features": all_GD.detach(), "gradient": own_BD.grad, "ids": gather(torch.tensor([rank, rank + 10]))}
    torch.save(
        {"losses": results, "gathered": gathered, "largest": largest_in_chunks()}, os.path.join(folder, f"{rank}.pt")
    )
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 4], ids=["two", "four"])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    run_on_ranks(run_rank, request.param, str(folder), request.param)
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


@pytest.mark.parametrize("index", range(len(CONFIGS)), ids=lambda i: f"{CONFIGS[i].name}-{i}")
def test_averaged_over_the_ranks_loss_and_gradients_are_those_of_the_global_batch(
    ranks: list[dict], index: int
) -> None:
    expected = step(CONFIGS[index], slice(None))
    assert "logit_scale" in expected
    for rank in ranks:
        actual = rank["losses"][index]
        assert actual.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(actual[name], tensor, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("custom", CONFIGS[-len(CUSTOM) :], ids=CUSTOM)
def test_a_users_loss_equals_the_built_in_loss_of_the_same_formula(custom: LossConfig) -> None:
    same = CUSTOM[custom.target.rpartition(".")[2]]  # type: ignore[attr-defined]
    expected, actual = step(same, slice(None)), step(custom, slice(None))
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


def test_no_rank_holds_more_similarities_than_a_chunk_of_its_rows_has_with_the_texts_of_one(ranks: list[dict]) -> None:
    assert [rank["largest"] for rank in ranks] == [CHUNK * ROWS] * len(ranks)


def test_gathering_keeps_the_order_of_the_ranks_and_sums_their_gradients(ranks: list[dict]) -> None:
    numbers = list(range(len(ranks)))
    factors = sum(number + 1 for number in numbers)
    for number, rank in enumerate(ranks):
        gathered = rank["gathered"]
        assert gathered["features"][:, 0].tolist() == [n for n in numbers for _ in range(2)]
        assert gathered["ids"].tolist() == [i for n in numbers for i in (n, n + 10)]
        # Row k of the gathered tensor has the factor k (r + 1) on rank r.
        assert gathered["gradient"][:, 0].tolist() == [factors * (2 * number), factors * (2 * number + 1)]


def test_one_process_gathers_what_it_has() -> None:
    own_BD = torch.ones(2, 3)
    assert gather_with_grad(own_BD) is own_BD
    assert gather(own_BD) is own_BD
