"""Contradictions in a fine-tuning configuration are reported before anything is loaded."""

import pytest

from clip_exp.errors import ConfigError
from clip_exp.training.preflight import check_train
from tests.compose import train_config

REFUSED = {
    "blocks without freezing": (["finetune.text.unfrozen_blocks=2"], "finetune.text.unfrozen_blocks=2 has no effect"),
    "negative blocks": (["finetune=lit", "finetune.image.unfrozen_blocks=-1"], "must be at least 0"),
    "a rate of a frozen tower": (
        ["finetune=lit", "finetune.image.lr_factor=0.1"],
        "no effect with finetune.image.freeze=true",
    ),
    "no rate": (["finetune.image.lr_factor=0"], "finetune.image.lr_factor=0 must be greater than 0; freeze=true"),
    "rising rates": (["finetune.text.layer_decay=1.1"], "finetune.text.layer_decay=1.1 must be at most 1"),
    "nothing to train": (["finetune=lit", "finetune.text.freeze=true"], "only the logit scale would be trained"),
    "frozen random weights": (["finetune=lit", "pretrained=null"], "random weights in the image tower"),
    "adapters on random weights": (["finetune=lora", "pretrained=null"], "random weights in the text tower"),
    "frozen towers with random weights": (["finetune=lp_ft", "pretrained=null"], "towers with random weights"),
    "no rank": (["finetune=lora", "finetune.lora.rank=0"], "finetune.lora.rank=0 must be greater than 0"),
    "no alpha": (["finetune=lora", "finetune.lora.alpha=0"], "finetune.lora.alpha=0 must be greater than 0"),
    "all dropped": (["finetune=lora", "finetune.lora.dropout=1"], "finetune.lora.dropout=1 must be less than 1"),
    "adapters nowhere": (["finetune=lora", "finetune.lora.image=false", "finetune.lora.text=false"], "one tower"),
    "adapters in a frozen tower": (["finetune=lora", "finetune.image.freeze=true"], "exclude each other"),
    "a rate of a tower without adapters": (
        ["finetune=lora", "finetune.lora.text=false", "finetune.text.lr_factor=2"],
        "finetune.text.lr_factor=2.0 has no effect",
    ),
    "frozen towers with adapters": (
        ["finetune=lora", "finetune.freeze_towers_steps=3"],
        "lora freezes the projections",
    ),
    "a negative number of frozen steps": (["finetune.freeze_towers_steps=-1"], "must be at least 0"),
    "frozen as long as the run": (["finetune.freeze_towers_steps=10", "max_steps=10"], "less than the 10 steps"),
    "frozen as long as the epochs": (["finetune.freeze_towers_steps=11", "epochs=1"], "less than the 11 steps"),
    "a warm-up that does not fit after the frozen steps": (
        ["finetune.freeze_towers_steps=10", "max_steps=15", "scheduler.warmup_steps=6"],
        "scheduler.warmup_steps=6 after finetune.freeze_towers_steps=10",
    ),
}


@pytest.mark.parametrize(("overrides", "expected"), REFUSED.values(), ids=REFUSED.keys())
def test_a_contradiction_is_refused_with_its_key(overrides: list[str], expected: str, tmp_path) -> None:
    weights = tmp_path / "start.safetensors"
    weights.touch()
    with pytest.raises(ConfigError) as caught:
        check_train(train_config(f"pretrained={weights}", *overrides))
    assert expected in str(caught.value)


@pytest.mark.parametrize("option", ["lit", "lora", "layer_decay", "lp_ft"])
@pytest.mark.parametrize(
    "strategy", ["auto", "ddp", "deepspeed_stage_1", "deepspeed_stage_2_offload", "deepspeed_stage_3"]
)
def test_every_way_of_fine_tuning_goes_with_every_strategy(option: str, strategy: str, tmp_path) -> None:
    weights = tmp_path / "start.safetensors"
    weights.touch()
    check_train(
        train_config(f"finetune={option}", f"strategy={strategy}", f"pretrained={weights}", "trainer.accelerator=cpu")
    )


OF_TIMM = ("model/image=timm", "model.image.name=vit_tiny_patch16_224", "model.image.pretrained=true")
OF_OPEN_CLIP = ("model=open_clip", "model.name=convnext_base", "model.image.pretrained=true")


@pytest.mark.parametrize("model", [OF_TIMM, OF_OPEN_CLIP], ids=["timm", "open_clip"])
def test_a_backbone_with_weights_of_its_own_can_be_locked_but_not_its_new_projection(model: tuple[str, ...]) -> None:
    check_train(train_config(*model, "finetune=lit", "finetune.image.unfrozen_blocks=0"))
    with pytest.raises(
        ConfigError, match=r"random projection of the image tower: set finetune\.image\.unfrozen_blocks=0"
    ):
        check_train(train_config(*model, "finetune=lit"))
    with pytest.raises(
        ConfigError, match="would freeze the random projection of the image tower: train the projection first"
    ):
        check_train(train_config(*model, "finetune=lora"))


def test_a_backbone_of_an_open_clip_configuration_is_random_unless_its_weights_are_requested() -> None:
    with pytest.raises(ConfigError, match="random weights in the image tower"):
        check_train(train_config(*OF_OPEN_CLIP[:2], "finetune=lit"))
