"""What the options of a strategy become in DeepSpeed's own configuration, and what its state is on a GPU and in a checkpoint.

`test_equivalence` trains under each of them.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from clip_exp.training import strategies
from clip_exp.training.fit import build_strategy
from clip_exp.training.strategies import (
    PortableDeepSpeedStrategy,
    load_loss_scale,
    loss_scale_state,
)
from tests.compose import train_config


@pytest.fixture(autouse=True)
def deepspeed_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed without a GPU, whatever a test builds a strategy for, and without a group."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # which building sets, and the test puts back
    from deepspeed import comm
    from deepspeed.accelerator import get_accelerator

    get_accelerator()  # chosen once in a process
    monkeypatch.setattr(comm, "get_rank", lambda: 1)  # its loss scaler asks before it logs


def deepspeed_config(*overrides: str, device_type: str = "cpu") -> dict[str, Any]:
    """What DeepSpeed is given."""
    strategy = build_strategy(train_config(*overrides).strategy, torch.device(device_type))
    assert isinstance(strategy, PortableDeepSpeedStrategy)
    assert isinstance(strategy.config, dict)
    return strategy.config


OFFLOADED = [
    ("deepspeed_stage_2", 2, set()),
    ("deepspeed_stage_2_offload", 2, {"offload_optimizer"}),
    ("deepspeed_stage_3_offload", 3, {"offload_optimizer", "offload_param"}),
]


@pytest.mark.parametrize(("option", "stage", "in_host_memory"), OFFLOADED)
def test_offload_keeps_the_optimizer_in_host_memory_and_under_zero_3_the_weights_too(
    option: str, stage: int, in_host_memory: set[str]
) -> None:
    zero = deepspeed_config(f"strategy={option}")["zero_optimization"]
    assert zero["stage"] == stage
    assert {
        name for name, values in zero.items() if name.startswith("offload") and values["device"] == "cpu"
    } == in_host_memory


@pytest.mark.parametrize(("device_type", "pinned"), [("cuda", True), ("cpu", False)])
def test_what_is_offloaded_from_a_gpu_is_in_pinned_memory(device_type: str, pinned: bool) -> None:
    config = deepspeed_config("strategy=deepspeed_stage_3_offload", device_type=device_type)
    zero = config["zero_optimization"]
    assert [zero[name]["pin_memory"] for name in ("offload_optimizer", "offload_param")] == [pinned, pinned]


def test_deepspeed_averages_gradients_in_float32_and_does_not_time_steps_unless_configured() -> None:
    config = deepspeed_config("strategy=deepspeed_stage_2")
    assert config["communication_data_type"] == "fp32"
    assert config["timers"]["throughput"] == {"enabled": False}
    overridden = deepspeed_config(
        "strategy=deepspeed_stage_2",
        "+strategy.config.communication_data_type=bf16",
        "+strategy.config.timers.throughput.enabled=true",
    )
    assert overridden["communication_data_type"] == "bf16"
    assert overridden["timers"]["throughput"] == {"enabled": True}


# ------------------------------------------------------------------------------------------------- the optimizer's state


class LoadedOnMeta(PortableDeepSpeedStrategy):
    """The strategy of one rank whose ZeRO optimizer steps one flat tensor, on a device that is not the checkpoint's.

    Args:
        options: of the optimizer.
        loss_scaler: of the ZeRO optimizer.
    """

    world_size, global_rank = 1, 0

    def __init__(self, options: dict[str, bool], loss_scaler: Any = None) -> None:
        self.parameter = nn.Parameter(torch.zeros(8, device="meta"))
        self.flat = torch.zeros(8, device="meta", requires_grad=True)
        self.inner = torch.optim.AdamW([self.flat])
        self.inner.param_groups[0].update(options)
        zero = SimpleNamespace(
            optimizer=self.inner, single_partition_of_fp32_groups=[self.flat], loss_scaler=loss_scaler
        )
        self._optimizers = [zero]  # type: ignore[list-item]

    def _trained_parameters(self) -> list[nn.Parameter]:
        return [self.parameter]


def checkpoint(options: dict[str, bool]) -> dict[str, Any]:
    state = {"step": torch.tensor(3.0), "exp_avg": torch.zeros(8), "exp_avg_sq": torch.zeros(8)}
    return {
        "optimizer_states": [{"state": {0: state}, "param_groups": [{"params": [0], "lr": 1e-3, **options}]}],
    }


def devices(state: dict[str, Tensor]) -> dict[str, str]:
    return {name: value.device.type for name, value in state.items()}


@pytest.mark.parametrize("options", [{"fused": True}, {"capturable": True}, {"fused": False}])
def test_what_deepspeed_resumes_with_is_on_the_devices_where_torch_would_load_it(
    options: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strategies, "_set_whole", lambda *arguments: None)  # meta tensors take no values
    strategy, saved = LoadedOnMeta(options), checkpoint(options)
    strategy.load_optimizer_state_dict(saved)
    theirs = torch.optim.AdamW([strategy.flat])
    group = {**theirs.param_groups[0], **options, "params": [0]}
    theirs.load_state_dict({"state": saved["optimizer_states"][0]["state"], "param_groups": [group]})
    assert devices(strategy.inner.state[strategy.flat]) == devices(theirs.state[strategy.flat])


# ------------------------------------------------------------------------------------------------------- the loss scale


def dynamic_loss_scaler(updates: list[bool]) -> Any:
    """DeepSpeed's, as Lightning configures it but for a short window, after updates with and without an overflow."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    scaler = DynamicLossScaler(
        init_scale=2**16, scale_window=4, min_scale=1, delayed_shift=2, consecutive_hysteresis=False
    )
    for overflow in updates:
        scaler.update_scale(overflow)
    return scaler


def test_a_resumed_loss_scale_changes_at_the_steps_of_an_uninterrupted_one() -> None:
    before = [True, True, False, True, *[False] * 6]
    after = [*[False] * 5, True, *[False] * 9]
    for cut in range(len(before)):
        uninterrupted, resumed = dynamic_loss_scaler(before[:cut]), dynamic_loss_scaler([])
        load_loss_scale(resumed, loss_scale_state(uninterrupted))
        scales: dict[str, list[float]] = {"uninterrupted": [], "resumed": []}
        for overflow in [*before[cut:], *after]:
            for name, scaler in (("uninterrupted", uninterrupted), ("resumed", resumed)):
                scaler.update_scale(overflow)
                scales[name].append(scaler.cur_scale)
        assert scales["resumed"] == scales["uninterrupted"]
        assert len(set(scales["resumed"])) > 2


def test_the_loss_scale_is_saved_and_loaded_with_the_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strategies, "_set_whole", lambda *arguments: None)
    written: list[dict[str, Any]] = []
    monkeypatch.setattr(strategies.Strategy, "save_checkpoint", lambda self, saved, *_: written.append(saved))
    trained, resumed = (LoadedOnMeta({}, dynamic_loss_scaler(updates)) for updates in ([True] * 5 + [False], []))
    trained.save_checkpoint({**checkpoint({}), "global_step": 6}, "checkpoint")
    assert written[0]["global_step"] == 6
    resumed.load_optimizer_state_dict(written[0])
    assert vars(resumed.optimizers[0].loss_scaler) == vars(trained.optimizers[0].loss_scaler)
    assert resumed.optimizers[0].loss_scaler.cur_scale == 2**12


def test_a_loss_scale_carries_over_from_deepspeed_to_ddp_and_back() -> None:
    ddp, deepspeed = GradScaler("cpu"), dynamic_loss_scaler([])
    ddp.load_state_dict(loss_scale_state(dynamic_loss_scaler([True] * 5)))
    assert ddp.get_scale() == 2**12
    load_loss_scale(deepspeed, GradScaler("cpu", init_scale=2**10).state_dict())
    assert deepspeed.cur_scale == 2**10


def test_a_checkpoint_of_before_the_loss_scale_was_saved_starts_with_the_default_scale(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(strategies, "_set_whole", lambda *arguments: None)
    strategy = LoadedOnMeta({}, dynamic_loss_scaler([]))
    strategy.load_optimizer_state_dict(checkpoint({}))
    assert vars(strategy.optimizers[0].loss_scaler) == vars(dynamic_loss_scaler([]))
