"""Tests that keys which are set but unused by the selected options are errors, and only those."""

import re
from pathlib import Path

import pytest

import clip_exp
from clip_exp.config.base import parse, typed_keys, unused_keys
from clip_exp.config.commands import SCHEMAS
from clip_exp.config.compose import compose
from clip_exp.config.evaluation import EvaluateConfig
from clip_exp.config.files import options, read_run_config, to_yaml
from clip_exp.config.names import named_model
from clip_exp.errors import ConfigError
from clip_exp.open_clip_files import configurations
from tests.compose import train_config
from tests.exhaustive import repeat_beyond
from tests.keys import nested_models

TIMM = ("model/image=timm", "model.image.name=resnet18")
BERT = ("model/text=huggingface", "model.text.name=bert")
CSV = ("data=csv", "data.train=pairs.csv")
CUSTOM = ("data=custom", "data._target_=tests.datasets.Pairs")
# For each choice of options: other typed keys, and a part of the message about each.
TRAINING: dict[tuple[str, ...], dict[str, str]] = {
    (*CSV, "data.val={_target_: tests.datasets.Pairs}"): {
        "data.label_key=label": "with the Dataset data.val, whose items have the labels",
    },
    (*CSV, "data.captions=all", "data.caption_key=[a,b]"): {
        "data.caption_weights=[1,2]": "with data.captions=all, which uses every caption of an image",
    },
    CUSTOM: {
        "data.shuffle_block=2": "with a full shuffle: set data.shuffle=block",
        "data.templates=['a {}']": "without labeled validation data",
    },
    (): {
        "model.text.cleaning=lower": "with OpenAI's tokenizer: leave it out, or set model.text.tokenizer",
        "model.text.strip_sep_token=true": "with OpenAI's tokenizer",
        "model.image.projection=mlp": "which is not selected",
        "model.text.pooler=mean": "which is not selected",
        "model.text.projection=mlp": "which is not selected",
        "++model.text.architecture={model_type: bert}": "which is not selected",
        "model.text.pretrained=true": "which is not selected",
        "model.text.name=bert": "which is not selected",
        "model.image.pretrained=true": "which is not selected",
        "model.image.name=resnet18": "which is not selected",
        "model.image.stages=[1,1,1,1]": "which is not selected",
        "finetune.text.unfrozen_blocks=2": "without finetune.text.freeze=true",
        "callbacks.ema_every_n_steps=1": "without callbacks.ema_decay",
        "pretrained_prefix=student": "without pretrained",
        "patience=3": "without a metric to monitor: set monitor",
        "monitor_mode=max": "without a metric to monitor",
        "task_every_n_steps=5": "without a task",
        "data.image_root=images": "with data=digits, which clip_exp generates",
        "data.caption_key=caption": "with data=digits, which clip_exp generates",
        "data.image_key=path": "with data=digits, which clip_exp generates",
        "data.columns=[label]": "with data=digits, which clip_exp generates",
        "data.shuffle_block=8": "with a full shuffle: set data.shuffle=block",
        "data.shuffle_window=256": "with a full shuffle",
        "data.augmentation.color_jitter_prob=0.5": "without data.augmentation.color_jitter",
        "data.augmentation.gaussian_blur_sigma=[1,2]": "with data.augmentation.gaussian_blur_prob=0",
        "data.generate.image_size=32": "with kind=digits",
    },
    ("model=rn50", "pretrained=x.pt", "strategy=ddp"): {
        "loss.init_logit_scale=3": "with pretrained=x.pt, which contains a logit scale",
        "model.image.projection=mlp": "which is not selected",
        "model.image.mlp_ratio=2": "which is not selected",
        "model.image.layers=2": "which is not selected",
        "model.image.patch_size=8": "which is not selected",
    },
    ("model=siglip_b16", *CSV): {
        "model.image.projection=mlp": "which is not selected",
        "model.text.trim=true": "which is not selected",
        "val_every_n_steps=5": "without validation data",
        "trainer.limit_val_batches=2": "without validation data: set data.val",
        "trainer.num_sanity_val_steps=2": "without validation data: set data.val",
        "data.label_key=label": "without validation data: set data.val",
        "data.val_seed=1": "without data.val_fraction: set that",
        "data.templates=['a {}']": "without labeled validation data",
    },
    ("model=open_clip", "model.name=ViT-B-32", "scheduler=constant", "data.on_bad_image=error"): {
        "model.image.projection=mlp": "which is not selected",
        "model.image.mlp_ratio=2": "which is not selected",
        "model.text.mlp_ratio=2": "which is not selected",
        "model.image.width=8": "which is not selected",
        "scheduler.final_factor=0.1": "on a constant learning rate",
        "data.max_bad_fraction=0.5": "stops at the first",
    },
    (*TIMM, *BERT): {
        "model.activation=gelu": "which define their own activation",
        "model.image.mlp_ratio=2": "which is not selected",
        "model.image.heads=2": "which is not selected",
        "model.text.vocab_size=100": "which is not selected",
        "model.text.layers=2": "which is not selected",
        "model.text.width=8": "which is not selected",
    },
    ("loss=custom", "loss._target_=torch.nn.Identity", "data.transform._target_=torch.nn.Identity"): {
        "loss.same_caption=positive": "on a custom loss",
        "data.augmentation.horizontal_flip=0.5": "with data.transform",
    },
    ("trainer.limit_val_batches=0", "trainer.gradient_clip_val=null", "keep_checkpoints=all"): {
        "val_every_n_steps=5": "with trainer.limit_val_batches=0",
        "trainer.num_sanity_val_steps=2": "with trainer.limit_val_batches=0",
        "trainer.gradient_clip_algorithm=value": "with trainer.gradient_clip_val=null",
        "keep_every_n_steps=5": "with keep_checkpoints=all",
    },
    ("monitor=val/loss",): {"min_delta=0.01": "without patience: set that (patience=3)"},
    (*TIMM, "pretrained=x.pt", "finetune=lit"): {
        "model.image.pretrained=true": "which contains the weights of both towers",
        "finetune.image.lr_factor=0.5": "with finetune.image.freeze=true and without finetune.image.unfrozen_blocks",
        "finetune.image.layer_decay=0.5": "with finetune.image.freeze=true",
    },
    ("pretrained=x.pt", "finetune=lora", "finetune.lora.text=false"): {
        "finetune.text.lr_factor=2": "since finetune.lora.text=false freezes the tower",
    },
}
USED = {
    "activation beside a resnet": ["model=rn50", "model.activation=quick_gelu", "model.dropout=0.1"],
    "activation beside timm's": [*TIMM, "model.activation=quick_gelu"],
    "what is not wanted": ["patience=null"],
    "cleaning by a tokenizer": ["model.text.tokenizer=folder", "model.text.cleaning=lower"],
    "blocks of shards": ["data=csv", "data.train=x-{000..009}.tar", "data.shuffle_block=8"],
    "a preset whose jitter is taken away": ["data/augmentation=strong", "data.augmentation.color_jitter=null"],
    "labels that are taken away": ["data.label_key=null"],
    "another loss with its preset": ["loss=sigmoid", "pretrained=x.pt"],
    "a preset whose validation is taken away": ["debug=default", "trainer.limit_val_batches=0"],
    "offload under DeepSpeed": ["strategy=deepspeed_stage_2_offload"],
}
TASKS = {
    "columns of a folder": ({"kind": "zero_shot", "root": "d", "label_key": "x"}, "task.t.label_key=x has no effect without task.t.table"),
    "root of generated images": ({"kind": "zero_shot", "generate": {"kind": "digits"}, "image_root": "d"}, "without task.t.table"),
    "labels of a table": ({"kind": "zero_shot", "table": "t", "ground_truth": "x"}, "without flat images in task.t.root"),
    "labels of ObjectNet": ({"kind": "zero_shot", "root": "d", "classes": "objectnet", "ground_truth": "x"}, "without flat images"),
    "fetching a folder": ({"kind": "knn", "root": "d", "train": {"root": "e", "download": True}}, "task.t.train.download=true has no"),
    "part of a table": ({"kind": "zero_shot", "table": "t", "split": "val"}, "without task.t.torchvision or task.t.generate"),
    "size of digits": ({"kind": "zero_shot", "generate": {"kind": "digits", "image_size": 8}}, "task.t.generate.image_size=8"),
    "seed of one C": ({"kind": "linear_probe", "c": [1.0], "seed": 3, "root": "d", "train": {"root": "e"}}, "leaves no choice"),
    "weights of no baseline": ({"kind": "robustness", "root": "d", "baseline": None, "baseline_weights": "x.pth"}, "without task.t.baseline"),
}  # fmt: skip

# For other commands and typed keys: a part of the message about each of the last ones.
COMMANDS = {
    ("embed", "images=photos"): {
        "caption_key=text": "without table: set that, or leave this out",
        "columns=[uid]": "without table",
        "similarity=true": "without table",
        "image_root=images": "without table",
        "datacomp_name=b32": "without format=datacomp",
    },
    ("make-shards", "data.train=pairs.csv"): {
        "data.val=pairs.csv": "on shards, which are made of data.train: write it by a second command",
        "data.shuffle=full": "on shards, which have the rows of the table in its order",
        "data.num_workers=2": "on shards",
    },
    ("make-shards", "data=digits"): {},
}


def problems(*overrides: str) -> list[str]:
    try:
        return list(unused_keys(compose("train", list(overrides)), typed_keys(overrides)))
    except ConfigError as error:  # a key of another tower than the chosen one
        return str(error).splitlines()


@pytest.mark.parametrize("chosen", TRAINING, ids=lambda chosen: " ".join(chosen) or "default")
def test_a_typed_key_without_effect_is_refused(chosen: tuple[str, ...]) -> None:
    reported = {re.split("=| is a key", problem)[0]: problem for problem in problems(*chosen, *TRAINING[chosen])}
    expected = {typed.lstrip("+").partition("=")[0]: part for typed, part in TRAINING[chosen].items()}
    assert reported.keys() == expected.keys()
    for key, part in expected.items():
        assert part in reported[key]


@pytest.mark.parametrize("overrides", USED.values(), ids=USED.keys())
def test_a_key_with_an_effect_is_not_refused(overrides: list[str]) -> None:
    assert problems(*overrides) == []


@pytest.mark.parametrize(("values", "expected"), TASKS.values(), ids=TASKS.keys())
def test_a_key_of_a_task_without_effect_is_refused(values: dict, expected: str) -> None:
    (problem,) = unused_keys(parse(EvaluateConfig, {"task": {"t": values}}))
    assert expected in problem


@pytest.mark.parametrize("chosen", COMMANDS, ids=" ".join)
def test_a_typed_key_of_another_command_without_effect_is_refused(chosen: tuple[str, ...]) -> None:
    overrides = [*chosen[1:], *COMMANDS[chosen]]
    reported = {
        problem.partition(" ")[0]: problem
        for problem in unused_keys(compose(chosen[0], overrides), typed_keys(overrides))
    }
    assert {key.partition("=")[0] for key in reported} == {typed.partition("=")[0] for typed in COMMANDS[chosen]}
    for typed, part in COMMANDS[chosen].items():
        assert part in next(text for key, text in reported.items() if key.partition("=")[0] == typed.partition("=")[0])


def test_every_line_of_the_tables_is_tested_above() -> None:
    tried = f"{TRAINING} {TASKS} {COMMANDS} model.dropout"
    tables = [model.__dict__.get("unused", ()) for model in nested_models(*SCHEMAS.values())]
    missing = [
        unused.keys
        for table in tables
        for unused in table
        if not any(key.rpartition(".")[2] in tried for key in unused.keys.split())
    ]
    assert missing == []


def test_a_key_in_a_file_of_the_user_counts_as_set_where_it_is_not_the_default() -> None:
    config = train_config()
    written_out = config.model_copy(update={"patience": None, "monitor_mode": "auto"})
    assert unused_keys(written_out) == []
    assert len(unused_keys(config.model_copy(update={"patience": 3}))) == 1


def test_the_configuration_of_a_run_is_never_refused(tmp_path: Path) -> None:
    """Its file contains all defaults."""
    (tmp_path / "config.yaml").write_text(to_yaml(train_config("loss=sigmoid", "data/augmentation=strong")))
    assert unused_keys(read_run_config(tmp_path)) == []


@pytest.mark.parametrize(
    "model", repeat_beyond(["siglip_so400m"], [name for name in options("model") if name != "open_clip"])
)
def test_no_model_sets_a_key_that_another_tower_leaves_unused(model: str) -> None:
    for towers in ((), TIMM, BERT):
        assert problems(f"model={model}", *towers) == []


GROUPS = ("data/augmentation", "loss", "optimizer", "scheduler", "strategy", "finetune", "callbacks", "logger", "debug")


@pytest.mark.parametrize("group", repeat_beyond(["scheduler", "debug"], GROUPS))
def test_no_option_sets_what_has_no_effect(group: str) -> None:
    needed = {
        "optimizer=custom": ["optimizer._target_=torch.optim.RAdam", "optimizer.lr=1e-3"],
        "loss=custom": ["loss._target_=torch.nn.Identity"],
    }
    for choice in (f"{group}={option}" for option in options(group)):
        assert problems(choice, *needed.get(choice, []), *CSV) == []


@pytest.mark.exhaustive
def test_no_configuration_of_open_clip_sets_what_has_no_effect() -> None:
    for name in configurations():
        assert list(unused_keys(named_model(name), (), "model.")) == []


def test_an_evaluation_refuses_what_a_trained_model_does_not_use() -> None:
    words = [
        "model=vit_nano",
        "pretrained=x.pt",
        "task=digits",
        "model.dropout=0.1",
        "model.image.mlp_ratio=4",
        "model.text.cleaning=lower",
    ]
    found = list(unused_keys(compose("evaluate", words), typed_keys(words)))
    assert [problem.partition(" has no effect ")[0] for problem in found] == [
        "model.dropout=0.1",
        "model.text.cleaning=lower",
    ]


def test_the_command_and_the_function_report_the_typed_key(refused, tmp_path: Path) -> None:
    result = refused("train.py", "patience=2", "data.image_key=filepath", cwd=tmp_path)
    assert result.returncode == 2
    assert "patience=2 has no effect" in result.stderr
    assert "data.image_key=filepath has no effect" in result.stderr
    folder = ("task=image_folder", "task.image_folder.root=x", "task.image_folder.separator=auto")
    result = refused("evaluate.py", "model=vit_nano", "pretrained=x.pt", "model.dropout=0.1", *folder, cwd=tmp_path)
    assert "model.dropout=0.1 has no effect on a trained model" in result.stderr
    assert "task.image_folder.separator=auto has no effect without task.image_folder.table" in result.stderr
    with pytest.raises(ConfigError, match=r"callbacks\.ema_every_n_steps=1 has no effect"):
        clip_exp.train("callbacks.ema_every_n_steps=1")
