"""Diagnosis of a run that learns nothing: each cause is reported once, with the key to change, and runs that learn get no message."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from clip_exp.checkpoints.folders import latest
from clip_exp.losses.batch import CLIPOutput
from clip_exp.losses.custom.loss import CustomLoss
from clip_exp.losses.sigmoid import SigmoidLossConfig
from clip_exp.losses.softmax import SoftmaxLossConfig
from clip_exp.models.clip import unit_norm
from clip_exp.training.diagnosis import Diagnosis, LoggedStep, Watch, likeness, watched_towers
from clip_exp.training.metrics import StepMetrics
from clip_exp.training.skipped_steps import SkippedSteps
from tests.compose import train_config
from tests.runs import TINY, Finished, Train

CHANCE = "This is the chance level"
EQUAL = "nearly the same feature"
DIAGNOSES = (CHANCE, EQUAL, "the caption of another pair", "are also training rows")
LN_8 = math.log(8)
# Rows of a run of 300 steps of 8 pairs with 30 steps of warm-up at a rate of 0.1: both towers give constant features.
STUCK = [(50, 2.0794), (100, 2.0795), (150, 2.0794), (200, 2.0794), (250, 2.0794), (300, 2.0794)]
HEALTHY = {"image": 0.66, "text": 0.76}  # of a run on photographs


def watch(chance: float | None = LN_8, warmup: int = 30, towers: tuple[str, ...] = ("image", "text")) -> Watch:
    return Watch(8, chance, warmup, towers)


def reports(
    watch: Watch,
    rows: Iterable[tuple[int, float]],
    likeness: dict[str, float] | None = None,
    logit_scale: float = 14.3,
) -> list[tuple[int, str]]:
    """Return the messages for logged steps, with their steps."""
    return [
        (step, message)
        for step, loss in rows
        for message in watch.add(LoggedStep(step, loss, logit_scale, 0.1, likeness or HEALTHY))
    ]


# ------------------------------------------------------------------------------------------------------ the chance level


def test_a_loss_at_the_chance_level_is_reported_once_with_the_key_to_change() -> None:
    ((step, message),) = reports(watch(), STUCK)
    assert step == 150, "while it trains"
    assert message.startswith("The loss has been 2.0794 since step 50. This is the chance level")
    assert "optimizer.lr is too high: lower it (the rate is now 0.1)" in message


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param([(step, 2.0794) for step in range(1, 31)], id="warm-up"),
        pytest.param([(step, 2.0794) for step in range(1, 81)], id="fewer than 50 steps after the warm-up"),
        pytest.param([(100, 2.0794), (200, 2.0794)], id="two rows"),
        pytest.param([(step, 2.0794 - step * 1e-4) for step in range(31, 300)], id="a loss that passes through the level"),
        pytest.param([(step, 2.0794 + (-1) ** step * 2e-3) for step in range(31, 300)], id="a loss that varies around the level"),
        pytest.param([(50, 2.0794), (100, 2.0794), (150, 2.05), (200, 2.0794), (250, 2.0794)], id="a loss that leaves the level"),
        pytest.param([(step, 3.0) for step in range(31, 300)], id="a higher loss, as of pretrained weights on other data"),
    ],
)  # fmt: skip
def test_a_loss_that_is_at_the_chance_level_for_a_short_time_is_not_reported(rows: Sequence[tuple[int, float]]) -> None:
    assert reports(watch(), rows) == []


def test_a_loss_whose_chance_level_is_unknown_is_not_compared_with_one() -> None:
    """As a custom loss, or a loss of a user's package."""
    assert reports(watch(chance=None), STUCK) == []
    custom = train_config("loss=custom", "loss._target_=torch.nn.CrossEntropyLoss").loss
    assert custom.chance_level(8) is None


def constant_output(pairs: int, z: float) -> CLIPOutput:
    """Return features that are equal for all images and for all texts, and whose logits are z under the sigmoid loss."""
    one = unit_norm(torch.ones(1, 4)).expand(pairs, 4)
    return CLIPOutput(one, one, torch.tensor([10.0]), torch.tensor([z - 10.0]))


@pytest.mark.parametrize("pairs", [2, 8, 100])
@pytest.mark.parametrize("same_caption", ["negative", "positive"])
def test_the_softmax_loss_of_equal_features_is_its_chance_level(pairs: int, same_caption: Any) -> None:
    config = SoftmaxLossConfig(same_caption=same_caption)
    captions = torch.arange(pairs) // 2
    loss = config.build()(constant_output(pairs, 0.0), captions, torch.arange(pairs))
    assert loss.item() == pytest.approx(config.chance_level(pairs), abs=1e-5) == math.log(pairs)


@pytest.mark.parametrize("pairs", [2, 8, 100])
def test_the_sigmoid_loss_of_equal_features_with_the_best_bias_is_its_chance_level(pairs: int) -> None:
    config = SigmoidLossConfig()
    ids = torch.arange(pairs)
    losses = {
        z: config.build()(constant_output(pairs, z), ids, ids).item()
        for z in (-math.log(pairs - 1), *torch.linspace(-10, 5, 151).tolist())
    }
    chance = config.chance_level(pairs)
    assert chance is not None
    assert losses[-math.log(pairs - 1)] == pytest.approx(chance, rel=1e-5)
    assert min(losses.values()) > chance - 1e-4
    assert SigmoidLossConfig(same_caption="positive").chance_level(pairs) is None  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------- equal features


def test_equal_features_of_a_tower_are_reported_once_with_the_key_to_change() -> None:
    rows = [(step, 2.2) for step in range(40, 310, 10)]
    ((step, message),) = reports(watch(), rows, {"image": 0.9999, "text": 0.7})
    assert step == 90
    assert message.startswith("All images of a batch have had nearly the same feature since step 40")
    assert (
        "optimizer.lr is too high (the rate is now 0.1): lower it, or increase scheduler.warmup_steps (now 30)"
        in message
    )
    ((_, message),) = reports(watch(), rows, {"image": 0.9999, "text": 0.9998})
    assert message.startswith("All images and all captions of a batch")


@pytest.mark.parametrize(
    ("found", "logit_scale", "towers"),
    [
        pytest.param({"image": 0.97, "text": 0.97}, 14.3, ("image", "text"), id="as random weights"),
        pytest.param({"image": 0.995, "text": 0.995}, 100.0, ("image", "text"), id="a narrow cone with a scale of 100"),
        pytest.param({"image": 0.9999, "text": 0.7}, 14.3, ("text",), id="a frozen image tower"),
        pytest.param({"image": math.nan, "text": math.nan}, 14.3, ("image", "text"), id="nothing to compare"),
    ],
)  # fmt: skip
def test_features_that_can_be_told_apart_or_are_not_trained_are_not_reported(
    found: dict[str, float], logit_scale: float, towers: tuple[str, ...]
) -> None:
    assert reports(watch(towers=towers), [(step, 2.2) for step in range(40, 310, 10)], found, logit_scale) == []


def test_equal_features_during_warm_up_are_not_reported() -> None:
    assert reports(watch(warmup=300), STUCK, {"image": 1.0, "text": 1.0}) == []


def test_likeness_is_the_mean_squared_cosine_between_different_images() -> None:
    features = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.0], [3.0, 4.0], [-1.0, 0.0]]))
    # Images 0 and 1 are the same image, which may have equal features.
    assert likeness(features, torch.tensor([7, 7, 8, 9])).item() == pytest.approx((2 * 0.36 + 2 * 1 + 0.36) / 5)
    assert likeness(features[:2], torch.tensor([7, 7])).isnan()
    spread = F.normalize(torch.randn(256, 64, generator=torch.manual_seed(0)))
    assert likeness(spread, torch.arange(256)).item() == pytest.approx(1 / 64, rel=0.05), "whose rank is 64"


class Tower(nn.Module):
    def __init__(self, *, frozen: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1), requires_grad=not frozen)


def uses_images(image_features: torch.Tensor) -> torch.Tensor:
    return image_features.sum()


def test_towers_without_trained_weights_or_without_a_part_in_the_loss_are_not_watched() -> None:
    free = SimpleNamespace(image=Tower(frozen=False), text=Tower(frozen=False))
    locked = SimpleNamespace(image=Tower(frozen=True), text=Tower(frozen=False))
    softmax, custom = SoftmaxLossConfig().build(), CustomLoss(uses_images, "mine.uses_images")
    assert watched_towers(SimpleNamespace(model=free, loss=softmax)) == ("image", "text")
    assert watched_towers(SimpleNamespace(model=locked, loss=softmax)) == ("text",)
    assert watched_towers(SimpleNamespace(model=free, loss=custom)) == ("image",)
    assert watched_towers(SimpleNamespace(model=locked, loss=custom)) == ()


def test_features_are_read_at_logged_steps_only() -> None:
    """Reading them waits for the GPU."""
    metrics = StepMetrics(10, 16, 96, SkippedSteps(0, lambda step: []))
    callback = Diagnosis(train_config(), metrics)
    callback.watch = watch()
    metrics.latest = {"samples_seen": 10 * 16}
    unlogged: Any = SimpleNamespace(global_step=11)
    callback.on_train_batch_end(unlogged, None, None, None, 0)
    with pytest.raises(AttributeError, match="last_features"):
        callback.on_train_batch_end(SimpleNamespace(global_step=10), None, None, None, 0)  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------------------------------- runs


def diagnoses(run: Finished) -> list[str]:
    """Return the lines of a run's log with a diagnosis."""
    lines = (run.folder / "train.log").read_text().splitlines()
    return [line for line in lines if any(text in line for text in DIAGNOSES)]


def test_a_run_with_too_high_a_rate_is_diagnosed_while_it_trains_once_on_several_ranks(train: Train) -> None:
    words = [word for word in TINY if not word.startswith(("optimizer.lr", "data.generate.val_rows"))]
    run = train(
        *words, "optimizer.lr=0.1", "max_steps=70", "trainer.devices=2", "global_batch_size=8", "data.generate.val_rows=5",
        "scheduler.warmup_steps=2", "model.image.layers=2", "model.text.layers=2", draw=True,
    )  # fmt: skip
    chance, equal = diagnoses(run)
    assert "WARNING" in chance
    assert "The loss has been 2.0794 since step " in chance
    assert "All images and all captions" in equal
    log = (run.folder / "train.log").read_text()
    assert log.index(CHANCE) < log.index("step 70/70")
    # It also has few validation images, which is shown with their metrics.
    note = "only 5 validation images: recall is not reliable"
    lines = [line for line in run.output.splitlines() if line.startswith("val/loss")]
    assert len(lines) == 2
    assert all(line.endswith(f"({note})") for line in lines)
    assert run.summary["val_images"] == 5
    assert note in (run.folder / "report.html").read_text()


def test_a_run_on_digits_gets_no_diagnosis(digits: Finished) -> None:
    assert diagnoses(digits) == []
    assert "not reliable" not in digits.output


def test_weights_with_a_scale_of_100_and_a_locked_image_tower_get_no_diagnosis(
    digits: Finished, train: Train, tmp_path: Path
) -> None:
    weights = load_file(latest(digits.folder) / "model.safetensors")
    save_file({**weights, "logit_scale": torch.tensor([math.log(100)])}, tmp_path / "scale.safetensors")
    run = train(
        *TINY,
        "max_steps=60",
        f"pretrained={tmp_path / 'scale.safetensors'}",
        "finetune=lit",
        "scheduler.warmup_steps=2",
    )
    assert run.metrics[0]["train/logit_scale"] == pytest.approx(100, rel=1e-3)
    assert diagnoses(run) == []


@pytest.mark.exhaustive
@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
@pytest.mark.parametrize("finetune", ["full", "lit"])
def test_runs_on_photographs_get_no_diagnosis(
    loss: str, finetune: str, digits: Finished, real_data: Path, train: Train
) -> None:
    start = () if finetune == "full" else (f"pretrained_image={digits.folder}", "finetune=lit")
    run = train(
        "model=vit_nano", "data=csv", f"data.train={real_data}/flickr8k/train.csv", f"data.val={real_data}/flickr8k/dev.csv",
        "trainer.accelerator=cpu", "global_batch_size=64", "max_steps=150", "optimizer.lr=1e-3", f"loss={loss}", *start,
        "data.num_workers=1",
    )  # fmt: skip
    chance = {"softmax": SoftmaxLossConfig(), "sigmoid": SigmoidLossConfig()}[loss].chance_level(64)
    assert chance is not None
    assert finetune == "lit" or run.losses[-1] < chance - 0.1, "it learns"
    assert diagnoses(run) == []
