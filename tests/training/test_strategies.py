"""What the options of a strategy become in DeepSpeed's own configuration. `test_equivalence` trains under each of them."""

from typing import Any

import pytest
import torch

from clip_exp.training.strategies import PortableDeepSpeedStrategy, build_strategy
from tests.compose import train_config


@pytest.mark.parametrize(
    ("option", "stage", "in_host_memory"),
    [
        ("deepspeed_stage_2", 2, set()),
        ("deepspeed_stage_2_offload", 2, {"offload_optimizer"}),
        ("deepspeed_stage_3_offload", 3, {"offload_optimizer", "offload_param"}),
    ],
)
def test_offload_keeps_the_optimizer_in_host_memory_and_under_zero_3_the_weights_too(
    option: str, stage: int, in_host_memory: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # which building sets, and the test puts back
    strategy = build_strategy(train_config(f"strategy={option}").strategy, torch.device("cpu"))
    assert isinstance(strategy, PortableDeepSpeedStrategy)
    config: dict[str, Any] = strategy.config
    zero = config["zero_optimization"]
    assert zero["stage"] == stage
    assert {
        name for name, values in zero.items() if name.startswith("offload") and values["device"] == "cpu"
    } == in_host_memory
