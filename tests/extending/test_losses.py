"""The losses of examples/extending have equal losses on one process and on two, whatever the strategy and the micro-batch."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import train_once
from tests.exhaustive import repeat_beyond
from tests.extending.common import EXTENDED, SMALL, csv_of, parquet_of, write_pairs
from tests.runs import Finished, Train

LOSSES = ("hard_negatives", "multi_positive", "distillation", "stored_distillation", "predictor")
# More ranks, other strategies, and a part of the rank's pairs at a time
WAYS = {
    "ddp": ("strategy=ddp", "trainer.devices=2"),
    "deepspeed_stage_2": ("strategy=deepspeed_stage_2", "trainer.devices=2", "micro_batch_size=2"),
    "deepspeed_stage_1": ("strategy=deepspeed_stage_1", "trainer.devices=2"),
    "deepspeed_stage_3": ("strategy=deepspeed_stage_3", "trainer.devices=2"),
    "micro-batches": ("micro_batch_size=3",),
}
KEPT = {
    "ddp": LOSSES, "deepspeed_stage_2": ("distillation", "predictor"), "micro-batches": ("hard_negatives",),
}  # fmt: skip
STEPS = ("max_steps=3",)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def options(pairs: Path, train: Train, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[str, ...]]:
    def of(loss: str) -> tuple[str, ...]:
        words = (*EXTENDED, *SMALL, *STEPS, f"loss={loss}")
        match loss:
            case "multi_positive":
                return *words, *csv_of(pairs), "data.captions=all"
            case "stored_distillation":
                return *words, *parquet_of(pairs)
            case "distillation":
                teacher = train_once(
                    "teacher", train, tmp_path_factory, *SMALL, *csv_of(pairs), "max_steps=1", "seed=1"
                )
                return *words, *csv_of(pairs), f"loss.teacher={teacher.folder}"
        return *words, *csv_of(pairs)

    return of


@pytest.fixture(scope="module")
def alone(options: Callable, train: Train) -> Callable[[str], Finished]:
    """Return a function that trains with a loss in one process, once."""
    runs: dict[str, Finished] = {}

    def of(loss: str) -> Finished:
        if loss not in runs:
            runs[loss] = train(*options(loss))
        return runs[loss]

    return of


@pytest.mark.parametrize(
    ("loss", "way"),
    [
        pytest.param(loss, way, marks=() if loss in KEPT.get(way, ()) else pytest.mark.exhaustive)
        for loss in LOSSES
        for way in WAYS
    ],
)
def test_a_users_loss_has_equal_losses_in_every_way_of_training(
    loss: str, way: str, options: Callable, alone: Callable, train: Train
) -> None:
    expected = alone(loss)
    run = train(*options(loss), *WAYS[way])
    assert len(run.losses) == 3
    assert run.losses == pytest.approx(expected.losses, rel=1e-5)
    assert len({*run.losses}) == 3, "the weights change"


def test_every_loss_differs_from_the_symmetric_cross_entropy(alone: Callable, pairs: Path, train: Train) -> None:
    plain = train(*SMALL, *STEPS, *csv_of(pairs)).losses[0]
    for loss in ("hard_negatives", "predictor", "distillation"):
        assert alone(loss).losses[0] != pytest.approx(plain, rel=1e-5), loss


@pytest.mark.parametrize("stage", repeat_beyond((3,), (2, 3)))
def test_a_learnable_head_is_trained_in_bf16_under_zero(stage: int, options: Callable, train: Train) -> None:
    words = (
        *(o for o in options("predictor") if not o.startswith("precision")),
        "precision=bf16-mixed",
        "trainer.devices=2",
    )
    expected = train(*words, "strategy=ddp")
    run = train(*words, f"strategy=deepspeed_stage_{stage}")
    assert run.losses == pytest.approx(expected.losses, rel=0.02)
    assert len({*run.losses}) == 3
