"""The limit of the logit scale: by the loss, by the weights that a run starts from, or as configured; the same after a resume."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from clip_exp.config.names import named_model
from clip_exp.config.training import TrainConfig
from clip_exp.errors import ConfigError
from clip_exp.models.clip import build_model
from clip_exp.training.module import CLIPModule
from clip_exp.training.optim import logit_scale_range
from clip_exp.training.preflight import check_train
from tests.compose import train_config
from tests.runs import TINY, Train

SIGLIP = math.log(112.3)  # as published


@pytest.mark.parametrize(
    ("overrides", "start", "expected"),
    [
        (["loss=softmax"], 2.66, (0, math.log(100))),
        (["loss=softmax"], SIGLIP, (0, SIGLIP)),
        (["loss=softmax"], -0.5, (-0.5, math.log(100))),
        (["loss=sigmoid"], 2.3, (0, math.inf)),
        (["loss=sigmoid"], SIGLIP, (0, math.inf)),
        (["loss=softmax", "loss.max_logit_scale=6"], 2.66, (0, 6)),
        (["loss=sigmoid", "loss.max_logit_scale=4.6"], SIGLIP, (0, 4.6)),
    ],
)
def test_the_range_of_the_logit_scale(overrides: list[str], start: float, expected: tuple[float, float]) -> None:
    assert logit_scale_range(train_config(*overrides).loss, start) == expected


def module_of(config: TrainConfig, scale: float) -> CLIPModule:
    model = build_model(config.model, init_logit_scale=scale)
    module = CLIPModule(model, nn.Identity(), config, 10)
    module._trainer = SimpleNamespace(precision="32-true", global_rank=0)  # type: ignore[assignment]
    return module


def scale_after_a_step(module: CLIPModule) -> float:
    """With a gradient that lets the scale grow by far."""
    optimizer = module.configure_optimizers()["optimizer"]
    for group in optimizer.param_groups:
        group["lr"] = 1.0
    module.model.logit_scale.grad = torch.full([1], -1.0)
    optimizer.step()
    return module.model.logit_scale.item()


def saved(module: CLIPModule) -> dict[str, Any]:
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict(), "optimizer_states": []}
    module.on_save_checkpoint(checkpoint)
    return checkpoint


def test_weights_above_the_limit_are_never_cut_before_or_after_a_resume() -> None:
    config = train_config("model=vit_nano", "optimizer=sgd")
    first = module_of(config, SIGLIP)
    assert scale_after_a_step(first) == pytest.approx(SIGLIP)
    with torch.no_grad():
        first.model.logit_scale.fill_(4.65)  # what it has learned since
    checkpoint = saved(first)
    resumed = module_of(config, 2.66)
    resumed.load_state_dict(checkpoint["state_dict"])
    resumed.on_load_checkpoint(checkpoint)
    assert scale_after_a_step(resumed) == pytest.approx(SIGLIP)


def test_a_checkpoint_that_does_not_say_where_its_run_started_keeps_the_scale_that_it_has() -> None:
    config = train_config("model=vit_nano", "optimizer=sgd")
    checkpoint = saved(module_of(config, SIGLIP))
    del checkpoint["start_logit_scale"]
    resumed = module_of(config, 2.66)
    resumed.load_state_dict(checkpoint["state_dict"])
    resumed.on_load_checkpoint(checkpoint)
    assert scale_after_a_step(resumed) == pytest.approx(SIGLIP)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["loss.max_logit_scale=100"], r"loss.max_logit_scale=100 must be between 0 and 10: it is a natural logarithm"),
        (["loss.max_logit_scale=2"], r"loss.init_logit_scale=2.659\d+ must be at most 2, the largest logit scale"),
        (["loss.init_logit_scale=5"], r"loss.init_logit_scale=5 must be at most 4.60517, the largest logit scale"),
    ],
)
def test_a_limit_that_cannot_be_meant_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_train(train_config("model=vit_nano", "data=shapes", "loss=softmax", *overrides))


@pytest.fixture(scope="module")
def hot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights with the logit scale of SigLIP's."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "hot.safetensors"
    save_file(build_model(named_model("vit_nano"), init_logit_scale=SIGLIP).state_dict(), path)
    return path


@pytest.mark.parametrize(
    ("overrides", "expected", "message"),
    [
        ([], 112.3, "a logit scale of 112.3, above the limit of 100 (loss=softmax): this run uses their value as its limit"),
        (["loss.max_logit_scale=4"], 54.6, "a logit scale of 112.3, above the limit of 54.6 set by loss.max_logit_scale=4"),
    ],
)  # fmt: skip
def test_a_run_says_at_its_start_what_limits_the_scale_of_its_weights(
    overrides: list[str], expected: float, message: str, hot: Path, train: Train
) -> None:
    run = train(*TINY, "max_steps=2", "log_every_n_steps=1", "optimizer.lr=1e-5", f"pretrained={hot}", *overrides)
    assert message in (run.folder / "train.log").read_text()
    assert [row["train/logit_scale"] for row in run.metrics if "train/logit_scale" in row] == pytest.approx(
        [expected] * 2, rel=1e-3
    )
