"""One run, any strategy: the losses and weights of the single process, however the work is split."""

import shutil
from importlib.metadata import version

import pytest
import torch
from safetensors.torch import load_file

from tests.exhaustive import repeat_beyond
from tests.runs import TINY, Finished, Train

STRATEGIES = {
    "auto in micro-batches": ["micro_batch_size=3"],
    "ddp": ["strategy=ddp", "trainer.devices=2"],
    "auto on two devices": ["trainer.devices=2", "micro_batch_size=5"],
    "ZeRO-1": ["strategy=deepspeed_stage_1", "trainer.devices=2"],
    "ZeRO-2": ["strategy=deepspeed_stage_2", "trainer.devices=2"],
    "ZeRO-3": ["strategy=deepspeed_stage_3", "trainer.devices=2"],
    "ZeRO-3 in micro-batches": ["strategy=deepspeed_stage_3", "trainer.devices=2", "micro_batch_size=3"],
}
KEPT = [
    STRATEGIES[name] for name in ("auto in micro-batches", "auto on two devices", "ZeRO-3")
]  # see test_independent, too


@pytest.mark.parametrize("overrides", repeat_beyond(KEPT, STRATEGIES.values()), ids=STRATEGIES.keys())
def test_every_strategy_computes_what_the_single_process_does(
    overrides: list[str], single: Finished, train: Train
) -> None:
    run = train(*TINY, "max_steps=20", "log_every_n_steps=1", "val_every_n_steps=10", *overrides)
    assert len(run.losses) == 20
    assert run.losses == pytest.approx(single.losses, rel=1e-5)
    torch.testing.assert_close(run.weights, single.weights, rtol=0, atol=1e-4)
    ours, theirs = ({k: v for k, v in r.metrics[-1].items() if k.startswith("val/")} for r in (run, single))
    assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-6)


MIXED = (*(option for option in TINY if not option.startswith("precision")), "precision=bf16-mixed")


@pytest.mark.parametrize(
    "name", repeat_beyond(("ZeRO-2",), ("auto on two devices", "ddp", "ZeRO-1", "ZeRO-2", "ZeRO-3"))
)
def test_in_bf16_every_strategy_stays_close_to_float32_and_the_logit_scale_is_not_rounded(
    name: str, single: Finished, train: Train
) -> None:
    """Losses differ by what bf16 rounds: by 0.16% in the first ten steps and 2.5% after twenty, as measured; scales by 0.03%.

    The scale that a step uses is that of the float32 weights: bf16 would round it by up to 1.6%.
    """
    intervals = ("max_steps=20", "log_every_n_steps=1", "checkpoint_every_n_steps=10", "val_every_n_steps=20")
    run = train(*MIXED, *intervals, *STRATEGIES[name])
    assert run.losses[:10] == pytest.approx(single.losses[:10], rel=0.005)
    assert run.losses == pytest.approx(single.losses, rel=0.05)
    scales, exact = (
        [row["train/logit_scale"] for row in r.metrics if "train/logit_scale" in row] for r in (run, single)
    )
    assert scales == pytest.approx(exact, rel=1e-3)
    saved = load_file(run.folder / "checkpoints/step-000010/model.safetensors")["logit_scale"]
    assert scales[0] == pytest.approx(1 / 0.07, rel=1e-6)
    assert scales[10] == pytest.approx(saved.double().exp().item(), rel=1e-6)


@pytest.fixture(scope="module")
def deepspeed_ops(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment in which DeepSpeed compiles its CPU Adam once for this checkout, in half the time: unoptimized."""
    versions = "-".join(version(package) for package in ("deepspeed", "torch"))
    compiler = tmp_path_factory.mktemp("compiler") / "g++"
    compiler.write_text(f'#!/bin/sh\nexec {shutil.which("c++")} "$@" -O0 -g0\n')
    compiler.chmod(0o755)
    cache = getattr(pytestconfig, "cache", None)  # not there with -p no:cacheprovider
    folder = cache.mkdir(f"deepspeed-{versions}") if cache else tmp_path_factory.mktemp("ops")
    return {"CXX": str(compiler), "TORCH_EXTENSIONS_DIR": str(folder)}


@pytest.mark.parametrize("stage", repeat_beyond((), ("2_offload", "3_offload")))
def test_offloaded_adam_follows_the_single_process(stage: str, deepspeed_ops: dict[str, str], train: Train) -> None:
    """DeepSpeed's CPU Adam rounds differently, so the curves agree less closely than the fused kernel's."""
    run = train(
        *TINY,
        "max_steps=6",
        "log_every_n_steps=1",
        f"strategy=deepspeed_stage_{stage}",
        "trainer.devices=2",
        "scheduler.warmup_steps=2",
        **deepspeed_ops,
    )
    reference = train(*TINY, "max_steps=6", "log_every_n_steps=1", "scheduler.warmup_steps=2")
    assert run.losses == pytest.approx(reference.losses, rel=1e-4)


def test_zero_shot_validation_gathers_every_weight_that_zero_3_splits(train: Train) -> None:
    """DeepSpeed leaves small weights whole unless this is switched off; a larger model's would be split."""
    overrides = (
        "model=vit_nano",
        "data=digits",
        "max_steps=2",
        "global_batch_size=32",
        "precision=32-true",
        "trainer.accelerator=cpu",
    )
    split = "+strategy.config.zero_optimization.stage3_param_persistence_threshold=0"
    one = train(*overrides, "resume=never")
    two = train(*overrides, "resume=never", "strategy=deepspeed_stage_3", "trainer.devices=2", split)
    ours, theirs = ({k: v for k, v in r.metrics[-1].items() if k.startswith("val/")} for r in (two, one))
    assert "val/top1" in theirs
    assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-6)


@pytest.mark.exhaustive
def test_sigmoid_loss_is_the_same_on_one_and_two_ranks(train: Train) -> None:
    overrides = (*TINY, "loss=sigmoid", "max_steps=4", "log_every_n_steps=1")
    one = train(*overrides)
    two = train(*overrides, "strategy=deepspeed_stage_3", "trainer.devices=2")
    assert two.losses == pytest.approx(one.losses, rel=1e-5)
