"""What is frozen stays as it is to the bit, what is slowed learns at its rate, and every strategy does the same."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from clip_exp.checkpoints.folders import latest
from clip_exp.config.finetune import FineTuneConfig, TowerTuningConfig
from clip_exp.config.model import ModelConfig
from clip_exp.config.optimization import AdamWConfig
from clip_exp.errors import ConfigError
from clip_exp.models.clip import CLIP, build_model, encode
from clip_exp.models.families.clip import ResNetConfig
from clip_exp.models.families.huggingface import HuggingFaceTextConfig
from clip_exp.models.families.timm import TimmConfig
from clip_exp.training.module import CLIPModule
from clip_exp.training.optim import build_optimizer, build_scheduler, named_groups, prepare
from tests.compose import train_config
from tests.exhaustive import repeat_beyond
from tests.models.small import batch, small_config
from tests.runs import Finished, Train


def prepared(finetune: FineTuneConfig, dropout: float = 0.0) -> CLIP:
    torch.manual_seed(0)
    config = small_config(dropout=dropout)
    model = build_model(config)
    prepare(model, finetune, config)
    return model


def trained(model: CLIP) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


# ------------------------------------------------------------------------------------------------------- freezing


def test_a_locked_image_tower_leaves_the_text_tower_and_the_scale() -> None:
    model = prepared(FineTuneConfig(image=TowerTuningConfig(freeze=True)))
    assert trained(model) == {f"text.{name}" for name, _ in model.text.named_parameters()} | {"logit_scale"}


@pytest.mark.parametrize(("blocks", "learn"), [(0, ()), (1, ("transformer.blocks.1.",)), (2, ("transformer.blocks.",))])
def test_the_last_blocks_and_what_follows_them_can_be_left_to_learn(blocks: int, learn: tuple[str, ...]) -> None:
    model = prepared(FineTuneConfig(image=TowerTuningConfig(freeze=True, unfrozen_blocks=blocks)))
    expected = {
        name for name, _ in model.image.named_parameters() if name.startswith(("ln_post", "projection", *learn))
    }
    assert {name.removeprefix("image.") for name in trained(model) if name.startswith("image.")} == expected


def test_more_unfrozen_blocks_than_there_are_is_refused_with_the_number_there_is() -> None:
    with pytest.raises(ConfigError, match=r"finetune\.text\.unfrozen_blocks=3 must be at most 2, the number of blocks"):
        prepared(FineTuneConfig(text=TowerTuningConfig(freeze=True, unfrozen_blocks=3)))


def test_a_locked_tower_is_run_once_in_micro_batches_and_has_no_backward_pass() -> None:
    model = prepared(FineTuneConfig(image=TowerTuningConfig(freeze=True)))
    calls: list[int] = []
    model.image.register_forward_hook(lambda *_: calls.append(1))
    images, tokens = batch(6)
    features = encode(model.image, images, 2)
    assert not features.requires_grad
    (features * encode(model.text, tokens, 2)).sum().backward()
    assert len(calls) == 3


def resnet() -> ModelConfig:
    config = small_config(dropout=0.5)
    config.image = ResNetConfig(image_size=32, stages=[1, 1, 1, 1], width=8, heads=4)
    return config


def test_frozen_parts_stay_in_evaluation_mode_when_the_rest_is_set_to_training() -> None:
    config = train_config("finetune.image.freeze=true", "finetune.image.unfrozen_blocks=1", "finetune.text.freeze=true")
    config.model = resnet()
    model = build_model(config.model)
    prepare(model, config.finetune, config.model)
    module = CLIPModule(model, nn.Identity(), config, 10)
    for _ in range(2):  # as it is made, and after a validation
        norms = {name: m for name, m in model.image.named_modules() if isinstance(m, nn.BatchNorm2d)}
        learning = {name for name, norm in norms.items() if norm.weight.requires_grad}
        assert 0 < len(learning) < len(norms)
        assert all(norm.training == (name in learning) for name, norm in norms.items())
        assert not any(m.training for m in model.text.modules())
        module.eval()
        assert not any(m.training for m in module.modules())
        module.train()


def test_frozen_towers_of_lp_ft_run_as_in_evaluation() -> None:
    """Modules without weights, too: patches are seen all."""
    config = train_config("finetune=lp_ft")
    config.model = small_config(dropout=0.5)
    config.model.image.patch_dropout = 0.5
    model = build_model(config.model)
    CLIPModule(model, nn.Identity(), config, 300)
    assert model.training
    assert not any(module.training for tower in (model.image, model.text) for module in tower.modules())


# ----------------------------------------------------------------------------------------------------------- rates


def rates(finetune: FineTuneConfig) -> dict[str, float]:
    model = prepared(finetune)
    optimizer = build_optimizer(model, AdamWConfig(lr=1.0), finetune)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}


def test_rates_fall_by_the_decay_with_every_step_towards_the_input() -> None:
    found = rates(
        FineTuneConfig(image=TowerTuningConfig(lr_factor=0.1, layer_decay=0.5), text=TowerTuningConfig(lr_factor=2))
    )
    expected = {
        "image.projection.weight": 0.1,
        "image.ln_post.bias": 0.1,
        "image.transformer.blocks.1.mlp.fc.weight": 0.05,
        "image.transformer.blocks.0.ln_1.bias": 0.025,
        "image.positional_embedding": 0.0125,
        "text.token_embedding.weight": 2.0,
        "logit_scale": 1.0,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-12)
    assert len(found) == len(list(prepared(FineTuneConfig()).parameters()))


def test_without_other_rates_the_groups_are_those_of_earlier_checkpoints() -> None:
    model = prepared(FineTuneConfig())
    groups = named_groups(model, FineTuneConfig())
    assert [group.kind for group in groups] == ["decay", "no_decay", "logit_scale"]
    order = [name for name, _ in model.named_parameters()]
    for group, members in groups.items():
        names = [name for name, _ in members]
        assert names == sorted(names, key=order.index)
        matrices = all(p.ndim >= 2 and not name.endswith("positional_embedding") for name, p in members)
        assert matrices == (group.kind == "decay")
    optimizer = build_optimizer(model, AdamWConfig(lr=0.5), FineTuneConfig())
    assert [group["lr"] for group in optimizer.param_groups] == [0.5] * 3


def test_after_the_frozen_steps_the_towers_warm_up_from_there() -> None:
    config = train_config("finetune=lp_ft", "finetune.freeze_towers_steps=10", "optimizer.lr=1", "optimizer=sgd")
    model = prepared(config.finetune)
    optimizer = build_optimizer(model, config.optimizer, config.finetune)
    starts = [10 if group.delayed else 0 for group in named_groups(model, config.finetune)]
    scheduler = build_scheduler(optimizer, config.scheduler, 110, starts)
    early, delayed = [], []
    for _ in range(110):
        for start, group in zip(starts, optimizer.param_groups, strict=True):
            (delayed if start else early).append(group["lr"])
        optimizer.step()
        scheduler.step()
    # The rest's schedule is that of a run that is as long as what remains: ten steps of warm-up, then half a cosine.
    per_step = delayed[:: starts.count(10)]
    assert per_step[:10] == [0.0] * 10
    assert per_step[10:20] == pytest.approx([i / 10 for i in range(1, 11)])
    assert per_step[20] == 1.0
    assert early[0] == pytest.approx(1 / 11)


# ------------------------------------------------------------------------------------------------------- whole runs

RESNET = (
    "model.image.kind=resnet", "model.image.stages=[1,1,1,1]", "model.image.width=8", "model.image.heads=4",
)  # fmt: skip
RUN = (
    "model=vit_nano", *RESNET, "data=digits", "data.generate.rows=96", "data.generate.val_rows=24", "global_batch_size=16",
    "precision=32-true", "trainer.accelerator=cpu", "resume=never", "max_steps=8", "log_every_n_steps=1",
    "checkpoint_every_n_steps=3", "val_every_n_steps=4", "optimizer.lr=1e-3",
)  # fmt: skip
LIT = ("finetune=lit", "finetune.text.layer_decay=0.5", "finetune.text.lr_factor=2")
STRATEGIES = {
    "ddp": ["strategy=ddp", "trainer.devices=2"],
    "ZeRO-2": ["strategy=deepspeed_stage_2", "trainer.devices=2"],
}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights to start from, with statistics of batches that are not those of no batch."""
    config = train_config(*RUN).model
    torch.manual_seed(7)
    model = build_model(config)
    model.train()
    model.encode_image(torch.randn(8, 3, 32, 32))
    path = tmp_path_factory.mktemp("start") / "start.safetensors"
    save_file(model.state_dict(), path)
    return path


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ("finetune=lit", "finetune.image.unfrozen_blocks=5"),
            "finetune.image.unfrozen_blocks=5 must be at most 4, the number of blocks",
        ),
        (
            ("finetune=lora", "finetune.lora.image=false", "finetune.lora.targets=[query]"),
            "the text tower has fc, out,",
        ),
    ],
)
def test_what_a_tower_does_not_have_is_reported_before_the_run_has_a_folder(
    overrides: tuple[str, ...], expected: str, start: Path, command, tmp_path: Path
) -> None:
    result = command(
        "train.py", *RUN, f"pretrained={start}", *overrides, f"output_dir={tmp_path / 'outputs'}", cwd=tmp_path
    )
    assert result.returncode == 2, result.stderr
    assert expected in result.stderr
    assert not (tmp_path / "outputs" / "train").exists()


@pytest.fixture(scope="module")
def locked(start: Path, train: Train) -> Finished:
    return train(*RUN, *LIT, f"pretrained={start}")


def changed(checkpoint: Path, start: Path) -> set[str]:
    before, after = load_file(start), load_file(checkpoint / "model.safetensors")
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_a_locked_tower_keeps_its_weights_and_statistics_through_validations(locked: Finished, start: Path) -> None:
    assert any("running_mean" in name for name in load_file(start))
    assert {name for name in changed(latest(locked.folder), start) if not name.startswith("text.")} == {"logit_scale"}
    assert len(changed(latest(locked.folder), start)) > 20
    assert next(row["train/lr"] for row in locked.metrics if "train/lr" in row) == 1e-3


@pytest.mark.parametrize("overrides", repeat_beyond((), STRATEGIES.values()), ids=STRATEGIES)
def test_locked_and_slowed_towers_learn_the_same_under_every_strategy(
    overrides: list[str], locked: Finished, start: Path, train: Train
) -> None:
    run = train(*RUN, *LIT, f"pretrained={start}", *overrides)
    assert len(run.losses) == 8
    assert run.losses == pytest.approx(locked.losses, rel=1e-5)
    assert changed(latest(run.folder), start) == changed(latest(locked.folder), start)
    torch.testing.assert_close(run.weights, locked.weights, rtol=0, atol=1e-4)


@pytest.mark.parametrize("overrides", repeat_beyond(([],), ([], STRATEGIES["ZeRO-2"])), ids=["alone", "ZeRO-2"])
def test_frozen_towers_of_lp_ft_do_not_change(overrides: list[str], start: Path, train: Train) -> None:
    settings = ("finetune=lp_ft", "finetune.freeze_towers_steps=3", "max_steps=4", f"pretrained={start}")
    run = train(*RUN, *settings, *overrides)
    trained_first, tuned = (changed(run.folder / "checkpoints" / f"step-00000{step}", start) for step in (3, 4))
    heads = {name for name in load_file(start) if name.startswith("image.pool.")}
    assert trained_first == heads | {"text.projection.weight", "logit_scale"}
    assert any("running_mean" in name for name in tuned)
    assert len(tuned) > len(load_file(start)) / 2


# -------------------------------------------------------------------------------------------------- groups of parameters


BERT = {
    "model_type": "bert",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}


def test_positions_and_class_tokens_of_other_libraries_are_not_decayed_and_their_matrices_are() -> None:
    config = ModelConfig(
        name="foreign",
        embed_dim=32,
        image=TimmConfig(name="vit_tiny_patch16_224", image_size=32),
        text=HuggingFaceTextConfig(name="bert", architecture={**BERT, "pad_token_id": 0}),
    )
    with torch.device("meta"):
        groups = named_groups(build_model(config), FineTuneConfig())
    kind_of = {name: group.kind for group, members in groups.items() for name, _ in members}
    free = ["image.trunk.pos_embed", "image.trunk.cls_token", "text.encoder.embeddings.position_embeddings.weight"]
    assert {kind_of[name] for name in free} == {"no_decay"}
    decayed = ["image.trunk.patch_embed.proj.weight", "text.encoder.embeddings.word_embeddings.weight"]
    assert {kind_of[name] for name in decayed} == {"decay"}
