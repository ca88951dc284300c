"""Low-rank adapters: peft's numbers, plain weights wherever they are kept, and nothing else that learns."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from clip_exp.checkpoints.folders import latest
from clip_exp.config.finetune import FineTuneConfig, LoRAConfig
from clip_exp.errors import ConfigError
from clip_exp.models.clip import CLIP, build_model
from clip_exp.training.lora import adapt, adapted_part, merge, unmerge
from clip_exp.training.optim import prepare
from clip_exp.training.preflight import rehearse
from tests.compose import train_config
from tests.encoders import small_encoder
from tests.exhaustive import repeat_beyond
from tests.models.small import batch, small_config
from tests.runs import Finished, Train, unfinish

RUN = (
    "model=vit_nano", "data=digits", "data.generate.rows=96", "data.generate.val_rows=24", "global_batch_size=16",
    "precision=32-true", "trainer.accelerator=cpu", "finetune=lora", "finetune.lora.rank=4", "finetune.lora.dropout=0",
    "max_steps=8", "log_every_n_steps=1", "checkpoint_every_n_steps=4", "optimizer.lr=1e-3", "callbacks.ema_decay=null",
)  # fmt: skip
STRATEGIES = {
    "ddp": ["strategy=ddp", "trainer.devices=2"],
    "ZeRO-2": ["strategy=deepspeed_stage_2", "trainer.devices=2"],
}


def small_adapted(**settings) -> CLIP:
    """The small model with adapters in its image tower that change something."""
    torch.manual_seed(0)
    model = build_model(small_config())
    model.requires_grad_(False)
    adapt(model.image, LoRAConfig(rank=2, alpha=6.0, **settings), batch(1)[0], "image")
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def test_merged_weights_encode_what_the_adapted_tower_encodes() -> None:
    adapted, plain = small_adapted(), build_model(small_config())
    before = plain.encode_image(batch(4)[0])
    plain.load_state_dict(merge(adapted.state_dict(), LoRAConfig(rank=2, alpha=6.0)))
    torch.testing.assert_close(plain.encode_image(batch(4)[0]), adapted.encode_image(batch(4)[0]), rtol=0, atol=1e-5)
    assert not torch.allclose(plain.encode_image(batch(4)[0]), before, atol=1e-2)


def test_merging_is_what_peft_merges() -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(24, 32), nn.GELU(), nn.Linear(32, 16))
    theirs = get_peft_model(layers, LoraConfig(r=4, lora_alpha=12, target_modules=["0", "2"], init_lora_weights=False))
    state = {name.removeprefix("base_model.model."): value.clone() for name, value in theirs.state_dict().items()}
    ours = merge(state, LoRAConfig(rank=4, alpha=12.0))
    torch.testing.assert_close(ours, dict(theirs.merge_and_unload().state_dict()), rtol=0, atol=1e-6)


def test_unmerging_gives_back_every_bit() -> None:
    state = small_adapted().state_dict()
    back = unmerge(merge(state, LoRAConfig(rank=2, alpha=6.0)), adapted_part(state))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], value) for name, value in state.items())


def test_all_linear_layers_of_the_blocks_get_adapters_and_nothing_else_learns() -> None:
    model = small_adapted()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    layers = [
        f"image.transformer.blocks.{i}.{x}"
        for i in (0, 1)
        for x in ("attention.qkv", "attention.out", "mlp.fc", "mlp.proj")
    ]
    assert trained == {f"{layer}.lora_{factor}.default.weight" for layer in layers for factor in "AB"}


def test_named_targets_are_the_ends_of_names() -> None:
    model = small_adapted(targets=["qkv", "projection"])
    found = {name.split(".lora_A")[0] for name, _ in model.named_parameters() if "lora_A" in name}
    assert found == {f"image.transformer.blocks.{i}.attention.qkv" for i in (0, 1)} | {"image.projection"}


def adapted_layers(*targets: str, **settings) -> set[str]:
    """Of a model whose text tower calls its layers otherwise than the image tower does."""
    model = build_model(small_config())
    model.text.transformer.blocks = nn.ModuleList(nn.Sequential(nn.Linear(48, 48)) for _ in range(2))
    model.text.transformer.forward = lambda x_BND, pool_B: nn.Sequential(*model.text.transformer.blocks)(x_BND)[:, 0]
    prepare(model, FineTuneConfig(lora=LoRAConfig(rank=2, targets=list(targets), **settings)), small_config())
    return {name.split(".lora_A")[0] for name, _ in model.named_parameters() if "lora_A" in name}


def test_a_target_may_be_of_one_tower_only() -> None:
    found = adapted_layers("attention.qkv", "0")
    assert found == {
        f"{tower}.transformer.blocks.{i}.{x}"
        for tower, x in (("image", "attention.qkv"), ("text", "0"))
        for i in (0, 1)
    }


def test_an_unknown_target_is_reported_with_the_valid_ones_in_every_tower() -> None:
    with pytest.raises(
        ConfigError, match=r"\['query'\]: .* image tower has fc, out, .*, qkv; the text tower has 0, projection"
    ):
        adapted_layers("attention.qkv", "query", "0")
    with pytest.raises(ConfigError, match=r"\['qkv'\]: .* name; the text tower has 0, projection"):
        adapted_layers("qkv", "0", image=False)


def test_a_tower_that_has_none_of_the_targets_is_reported() -> None:
    with pytest.raises(
        ConfigError, match=r"the text tower has no linear layers that end in qkv. Set finetune.lora.text=false"
    ):
        adapted_layers("qkv")


def test_looking_for_layers_beforehand_runs_no_encoder() -> None:
    """Those of transformers do not run without memory."""
    names = ("model=vit_nano", "model/text=huggingface", "model.text.name=bert", "model.text.context_length=20")
    config = train_config(*names, "finetune=lora", "pretrained=start.safetensors")
    config.model.text.architecture = small_encoder("bert").to_dict()
    rehearse(config)
    config.finetune.lora.targets = ["query"]
    with pytest.raises(ConfigError, match="the image tower has no linear layers that end in query"):
        rehearse(config)


class ReadsWeights(nn.Module):
    """A tower with torch's own attention, which uses the weights of `out_proj` without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layer = self.blocks[0]
        x = layer.norm1(x + layer.self_attn(x, x, x, need_weights=False)[0])
        return layer.norm2(x + layer.linear2(layer.linear1(x).relu()))


def test_a_layer_that_is_never_called_gets_no_adapter_and_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    tower = ReadsWeights()
    adapt(tower, LoRAConfig(rank=2), torch.zeros(1, 3, 8), "image")
    assert (
        "the image tower has 1 linear layers that cannot have adapters, such as blocks.0.self_attn.out_proj"
        in caplog.text
    )
    assert {name.split(".lora_A")[0] for name, _ in tower.named_parameters() if "lora_A" in name} == {
        "blocks.0.linear1",
        "blocks.0.linear2",
    }
    with pytest.raises(ConfigError, match=r"blocks\.0\.self_attn\.out_proj .* not called"):
        adapt(ReadsWeights(), LoRAConfig(rank=2, targets=["out_proj"]), torch.zeros(1, 3, 8), "image")


def test_a_tower_without_linear_layers_is_refused() -> None:
    tower = nn.Sequential(nn.Sequential(nn.Conv1d(2, 2, 1), nn.Conv1d(2, 2, 1)))
    with pytest.raises(ConfigError, match=r"finetune\.lora\.image=false"):
        adapt(tower, LoRAConfig(), torch.zeros(1, 2, 3), "image")


# ------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights to start from."""
    from clip_exp.config.names import named_model

    torch.manual_seed(7)
    path = tmp_path_factory.mktemp("start") / "start.safetensors"
    save_file(build_model(named_model("vit_nano")).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def alone(start: Path, train: Train) -> Finished:
    return train(*RUN, f"pretrained={start}")


def check_weights(run: Finished, start: Path) -> None:
    before, after = load_file(start), run.weights
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    layers = ("attention.qkv.weight", "attention.out.weight", "mlp.fc.weight", "mlp.proj.weight")
    assert changed == {name for name in before if name.endswith(layers)} | {"logit_scale"}
    state = json.loads((latest(run.folder) / "state.json").read_text())["optimizer_states"][0]["state"]
    assert len(state) == 2 * (len(changed) - 1) + 1
    assert all(".lora_" in name or name == "logit_scale" for name in state)


def test_only_the_factors_and_the_scale_learn_and_have_optimizer_state(alone: Finished, start: Path) -> None:
    check_weights(alone, start)
    assert alone.record["trained_parameters"] < 0.02 * alone.record["parameters"]


@pytest.mark.parametrize("overrides", repeat_beyond([STRATEGIES["ddp"]], STRATEGIES.values()), ids=STRATEGIES)
def test_adapters_learn_the_same_under_every_strategy(
    overrides: list[str], alone: Finished, start: Path, train: Train
) -> None:
    run = train(*RUN, f"pretrained={start}", *overrides)
    assert len(run.losses) == 8
    assert run.losses == pytest.approx(alone.losses, rel=1e-5)
    check_weights(run, start)
    torch.testing.assert_close(run.weights, alone.weights, rtol=0, atol=1e-4)


def interrupted(run: Finished, output_dir: Path) -> None:
    """A copy of the finished run as it was after the checkpoint of step 4."""
    folder = output_dir / "train" / run.folder.parent.name / run.folder.name
    shutil.copytree(run.folder, folder)
    shutil.rmtree(folder / "checkpoints" / "step-000008")
    unfinish(folder)


@pytest.mark.parametrize("overrides", repeat_beyond(([],), ([], STRATEGIES["ZeRO-2"])), ids=["alone", "on ZeRO-2"])
def test_an_interrupted_run_resumes_bitwise_and_under_another_strategy(
    overrides: list[str], alone: Finished, start: Path, train: Train, tmp_path: Path
) -> None:
    interrupted(alone, tmp_path)
    run = train(*RUN, f"pretrained={start}", *overrides, output_dir=tmp_path)
    assert "resuming from" in run.output
    assert run.losses == (pytest.approx(alone.losses, rel=1e-5) if overrides else alone.losses)
    if not overrides:
        assert all(torch.equal(run.weights[name], weight) for name, weight in alone.weights.items())


def test_tasks_and_averages_see_merged_weights_and_dropout_resumes_bitwise(
    start: Path, train: Train, tmp_path: Path
) -> None:
    settings = (
        *RUN, f"pretrained={start}", "finetune.lora.dropout=0.2", "callbacks.ema_decay=0.5", "task=digits",
    )  # fmt: skip
    run = train(*settings)
    averaged = load_file(latest(run.folder) / "ema.safetensors")
    assert averaged.keys() == run.weights.keys()
    qkv = "image.transformer.blocks.0.attention.qkv.weight"
    first, last = load_file(start)[qkv], run.weights[qkv]
    assert 0 < (averaged[qkv] - first).norm() < (last - first).norm()
    interrupted(run, tmp_path)
    again = train(*settings, output_dir=tmp_path)
    assert again.losses == run.losses
    for file in ("model", "ema"):
        ours, theirs = (load_file(latest(r.folder) / f"{file}.safetensors") for r in (again, run))
        assert all(torch.equal(ours[name], weight) for name, weight in theirs.items())
    # An evaluation of the checkpoint, which knows nothing of adapters, scores what training scored.
    from clip_exp.api import evaluate

    result = evaluate(f"run={run.folder}", "task=digits", f"output_dir={tmp_path}", "accelerator=cpu")["digits"]
    scored = json.loads((run.folder / "eval" / "digits.json").read_text())
    assert scored["metrics"] == pytest.approx(result["metrics"], abs=1e-9)


@pytest.mark.exhaustive
def test_base_weights_stay_float32_where_a_strategy_trains_in_bf16(start: Path, train: Train) -> None:
    """DeepSpeed keeps float32 copies of what learns only."""
    run = train(*RUN, f"pretrained={start}", "precision=bf16-mixed", *STRATEGIES["ZeRO-2"])
    check_weights(run, start)
