"""A loss that is written for one process has, on any number of ranks, the value and the gradients of the formula on the global batch."""

import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from clip_exp.losses.batch import CLIPOutput
from clip_exp.losses.custom.loss import CustomLoss
from tests.extending.common import DIGITS, EXAMPLES, SMALL
from tests.processes import run_on_ranks
from tests.runs import Train

GLOBAL_BATCH, D, WEIGHT = 8, 6, 0.3


def leaves(dtype: torch.dtype) -> dict[str, Tensor]:
    """Features of a fixed global batch, not yet of unit norm, and a logit scale."""
    draw = torch.Generator().manual_seed(0)
    named = {name: torch.randn(GLOBAL_BATCH, D, generator=draw).to(dtype) for name in ("images", "texts", "negatives")}
    return {
        name: leaf.requires_grad_()
        for name, leaf in {**named, "logit_scale": torch.tensor([14.0], dtype=dtype)}.items()
    }


def plain_formula() -> dict[str, Tensor]:
    """Value and gradients of the loss, in float64, of one process and without the code of the project."""
    given = leaves(torch.float64)
    images, texts, negatives = (F.normalize(given[name], dim=-1) for name in ("images", "texts", "negatives"))
    loss = torch.zeros((), dtype=torch.float64)
    for i in range(GLOBAL_BATCH):
        to_texts = given["logit_scale"] * torch.cat([texts @ images[i], negatives @ images[i]])
        to_images = given["logit_scale"] * (images @ texts[i])
        loss = loss + WEIGHT * (torch.logsumexp(to_texts, 0) - to_texts[i])
        loss = loss + (1 - WEIGHT) * (torch.logsumexp(to_images, 0) - to_images[i])
    (loss / GLOBAL_BATCH).backward()
    return {
        "loss": (loss / GLOBAL_BATCH).detach(),
        **{name: leaf.grad for name, leaf in given.items() if leaf.grad is not None},
    }


def on_rank(rank: int, folder: str, world_size: int) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    sys.path.append(str(EXAMPLES))
    from hard_negatives import HardNegatives  # type: ignore[import-not-found]

    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    given, local = leaves(torch.float32), GLOBAL_BATCH // world_size
    rows = slice(rank * local, (rank + 1) * local)
    images, texts, negatives = (F.normalize(given[name][rows], dim=-1) for name in ("images", "texts", "negatives"))
    output = CLIPOutput(images, texts, given["logit_scale"], None, columns={"hard_negative": negatives})
    loss = CustomLoss(HardNegatives(WEIGHT), "hard_negatives.HardNegatives")(
        output, torch.arange(local), torch.arange(local)
    )
    loss.backward()
    found = {"loss": loss.detach(), **{name: leaf.grad for name, leaf in given.items() if leaf.grad is not None}}
    if world_size > 1:
        for tensor in found.values():  # as the strategies do with gradients
            dist.all_reduce(tensor)
            tensor /= world_size
        dist.destroy_process_group()
    torch.save(found, f"{folder}/{rank}.pt")


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_hard_negatives_have_value_and_gradients_of_the_plain_formula(world_size: int, tmp_path: Path) -> None:
    run_on_ranks(on_rank, world_size, str(tmp_path), world_size)
    expected = plain_formula()
    assert expected.keys() == {"loss", "images", "texts", "negatives", "logit_scale"}
    for rank in range(world_size):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name].double(), value, rtol=1e-6, atol=1e-6, msg=name)


TEXTBOOK = """
import torch
from torch.nn import functional as F

from clip_exp.losses.batch import gather_with_grad, own_columns


def clip(image_features, text_features, logit_scale):
    logits = logit_scale * image_features @ text_features.T
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def clip_of_own_rows(image_features, text_features, logit_scale):
    target = own_columns(len(image_features), image_features.device)
    of_images = F.cross_entropy(logit_scale * image_features @ gather_with_grad(text_features).T, target)
    of_texts = F.cross_entropy(logit_scale * text_features @ gather_with_grad(image_features).T, target)
    return (of_images + of_texts) / 2
"""
CLIP = ("loss=custom", "loss._target_=textbook.clip", "+loss._partial_=true")
OWN = ("loss=custom", "loss._target_=textbook.clip_of_own_rows", "+loss._partial_=true", "loss.gather=false")


@pytest.fixture(scope="module")
def options() -> tuple[str, ...]:
    return (*SMALL, *DIGITS, "max_steps=4")


def test_the_textbook_loss_of_a_user_trains_as_ours_does(
    options: tuple[str, ...], train: Train, tmp_path_factory: pytest.TempPathFactory
) -> None:
    ours = train(*options, "loss=softmax")
    for words in (CLIP, (*CLIP, "trainer.devices=2"), (*OWN, "trainer.devices=2")):
        folder = tmp_path_factory.mktemp("textbook")
        (folder / "textbook.py").write_text(TEXTBOOK)
        theirs = train(*options, *words, output_dir=folder)
        assert theirs.losses == pytest.approx(ours.losses, rel=1e-6, abs=1e-6), words
        torch.testing.assert_close(theirs.weights, ours.weights, rtol=0, atol=1e-4)
