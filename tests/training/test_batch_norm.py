"""ResNets under strategies of two ranks, each of which normalizes its own part of the batch."""

import pytest
import torch

from tests.exhaustive import repeat_beyond
from tests.runs import TINY, Finished, Train

RESNET = (
    *(TINY[1:]),
    "model=rn50",
    "model.image.image_size=64",
    "model.image.stages=[1,1,1,1]",
    "model.image.width=16",
    "model.image.heads=8",
    "model.embed_dim=32",
    "model.text.width=32",
    "model.text.heads=2",
    "model.text.layers=1",
    "max_steps=6",
    "val_every_n_steps=3",
    "log_every_n_steps=1",
    "trainer.devices=2",
    "micro_batch_size=3",
    "optimizer.lr=1e-4",
)
STRATEGIES = {
    "ZeRO-2": ["strategy=deepspeed_stage_2"],
    "ZeRO-3": [
        "strategy=deepspeed_stage_3",
        "+strategy.config.zero_optimization.stage3_param_persistence_threshold=0",
    ],
}


@pytest.fixture(scope="module")
def ddp(train: Train) -> Finished:
    return train(*RESNET, "strategy=ddp")


def test_micro_batches_count_once_in_the_running_statistics(ddp: Finished) -> None:
    # Shares of 8 in chunks of 3, 3 and 2.
    assert ddp.weights["image.stem.bn1.num_batches_tracked"] == 6 * 3


@pytest.mark.parametrize("overrides", repeat_beyond((), STRATEGIES.values()), ids=STRATEGIES)
def test_every_strategy_of_two_ranks_has_the_losses_statistics_and_validation_of_ddp(
    overrides: list[str], ddp: Finished, train: Train
) -> None:
    zero = train(*RESNET, *overrides)
    assert zero.losses == pytest.approx(ddp.losses, rel=1e-5)
    torch.testing.assert_close(zero.weights, ddp.weights, rtol=1e-4, atol=1e-4)
    ours, theirs = ({k: v for k, v in run.metrics[-1].items() if k.startswith("val/")} for run in (zero, ddp))
    assert ours.keys() >= {"val/loss"}
    assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-6)
